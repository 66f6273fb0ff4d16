// The functions of csrc/rotation.h that CPU and GPU share, compiled for the host, against golden
// angles: lines of a position, a step, a cosine and a sine. Exits with 0 where all agree.
#include "rotation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>

using namespace longrope;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) std::printf("failed: %s\n", what);
  failures += !holds;
}

void test_sets() {
  const int64_t max_length[] = {4096, 131072, 262144};
  expect(set_of_length(4096, max_length, 3) == 0, "4096 tokens are short");
  expect(set_of_length(4097, max_length, 3) == 1, "4097 tokens are not");
  expect(set_of_length(1 << 30, max_length, 3) == 2, "the last set serves all that is longer");
  expect(below_threshold(127, 128) && !below_threshold(128, 128), "the threshold itself is scaled");
  expect(!below_threshold(-1, 0), "no threshold");
}

// The golden angles hold for frequencies as they are, not for steps, whose rounding float64 shows.
double error_of_64(uint64_t phase) {
  const long double angle = static_cast<int64_t>(phase) * 3.406121580086554589335e-19L;  // 2 pi / 2^64
  const CosSin64 turn = cos_sin_64(phase);
  return std::max(std::abs(static_cast<double>(turn.cos - std::cos(angle))),
                  std::abs(static_cast<double>(turn.sin - std::sin(angle))));
}

}  // namespace

int main(int count, char** arguments) {
  test_sets();
  if (count != 2) {
    std::printf("usage: test_rotation golden_phases.txt\n");
    return 2;
  }
  std::ifstream file(arguments[1]);
  int64_t position;
  uint64_t step;
  double cos, sin, largest = 0.0, largest_64 = 0.0;
  int rows = 0;
  for (; file >> position >> step >> cos >> sin; ++rows) {
    const CosSin turn = cos_sin(phase(position, step));
    largest = std::max({largest, std::abs(turn.cos - cos), std::abs(turn.sin - sin)});
    largest_64 = std::max(largest_64, error_of_64(static_cast<uint64_t>(position) * step));
  }
  std::printf("%d golden angles, largest errors %.3g and %.3g\n", rows, largest, largest_64);
  expect(rows > 100 && file.eof(), "the whole table is read");
  expect(largest <= 1e-6, "cosines and sines within 1e-6");
  expect(largest_64 <= 1e-15, "those in float64 within 1e-15 of libm's");
  return failures == 0 ? 0 : 1;
}
