// The emulator against the layouts and rules of the PTX ISA, written out as tables and formulas
// that do not come from it. Exits with 0 where all holds.
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cuda/ptx.h"

using namespace longrope;
using longrope_cuda::launch;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

void expect_error(const std::string& part, const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return expect(std::string(error.what()).find(part) != std::string::npos,
                  "expected '" + part + "', got '" + error.what() + "'");
  }
  expect(false, "expected an error with '" + part + "', got none");
}

__global__ void indices(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 24 + thread] += block * 1000 + thread;
}

void test_indices() {
  std::vector<int> out(12 * 24, 0);
  launch(indices, "indices", dim3(2, 3, 2), dim3(4, 3, 2), 0, nullptr, out.data());
  for (int i = 0; i < 12 * 24; ++i) expect(out[i] == i / 24 * 1000 + i % 24, "indices");
}

// Each thread reads what its neighbour in another warp wrote.
__global__ void exchange(float* out, bool with_barrier) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int me = threadIdx.x, last = blockDim.x - 1;
  shared[me] = static_cast<float>(me);
  if (with_barrier) __syncthreads();
  out[me] = shared[last - me];
}

void test_barrier_and_poison() {
  std::vector<float> out(96);
  launch(exchange, "exchange", 1, 96, 96 * 4, nullptr, out.data(), true);
  for (int i = 0; i < 96; ++i) expect(out[i] == static_cast<float>(95 - i), "exchange");
  launch(exchange, "exchange", 1, 96, 96 * 4, nullptr, out.data(), false);
  expect(std::isnan(out[0]), "without a barrier, shared memory that nobody wrote is NaN");
}

__global__ void some_reach(int reaching) {
  if (static_cast<int>(threadIdx.x) < reaching) __syncthreads();
}
__global__ void meet_apart(int) {
  int x = 1;
  if (threadIdx.x < 16) {
    x = __shfl_xor_sync(~0u, x, 1);
  } else {
    x = __shfl_down_sync(~0u, x, 1);
  }
}
__global__ void lane_missing(int) {
  if (threadIdx.x != 5) __syncwarp();
}
__global__ void write_past(int) {
  if (threadIdx.x == 0) dynamic_shared()[64] = 1;
}
__global__ void never_waits(const float* from) {
  cp_async_16(dynamic_shared(), from, true);
  cp_async_commit();
}
__global__ void unaligned(const char* from) { cp_async_16(dynamic_shared() + 8, from, true); }

void test_errors() {
  alignas(16) const float from[4] = {1, 2, 3, 4};
  expect_error("some_reach, block (0, 0, 0): __syncthreads: 40 of 64 threads wait",
               [] { launch(some_reach, "some_reach", 1, 64, 0, nullptr, 40); });
  expect_error("lanes of a warp meet in",
               [] { launch(meet_apart, "meet_apart", 1, 32, 0, nullptr, 0); });
  expect_error("waits for lanes that never come",
               [] { launch(lane_missing, "lane_missing", 1, 32, 0, nullptr, 0); });
  expect_error("written outside its 64 bytes",
               [] { launch(write_past, "write_past", 1, 32, 64, nullptr, 0); });
  expect_error("copies in flight", [&] {
    launch(never_waits, "never_waits", 1, 1, 64, nullptr, static_cast<const float*>(from));
  });
  expect_error("not aligned to 16", [&] {
    launch(unaligned, "unaligned", 1, 1, 64, nullptr, reinterpret_cast<const char*>(from));
  });
  expect_error("a block of 2048", [] { launch(some_reach, "x", 1, 2048, 0, nullptr, 0); });
  launch(some_reach, "some_reach", 3, 64, 0, nullptr, 64);  // and it works again afterwards
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + 5 * threadIdx.x;
  mine[0] = __shfl_sync(~0u, lane, 7);
  mine[1] = __shfl_xor_sync(~0u, lane, 5);
  mine[2] = __shfl_up_sync(~0u, lane, 3);
  mine[3] = __shfl_down_sync(~0u, lane, 2, 8);
  mine[4] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0)) + __any_sync(~0u, lane == 40) +
            2 * __all_sync(~0u, lane < 32);
}

void test_shuffles() {
  std::vector<int> out(5 * 64);
  launch(shuffles, "shuffles", 1, 64, 0, nullptr, out.data());
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, *mine = &out[5 * i];
    expect(mine[0] == 7 && mine[1] == (lane ^ 5), "shfl, shfl_xor");
    expect(mine[2] == (lane < 3 ? lane : lane - 3), "shfl_up");
    expect(mine[3] == (lane % 8 < 6 ? lane + 2 : lane), "shfl_down in groups of 8");
    expect(mine[4] == 0x49249249 + 2, "ballot, any, all");
  }
}

// Two groups of copies, of which `pending` may stay open when they are read.
template <int kPending>
__global__ void copies(const float* from, float* out, bool valid) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  for (int group = 0; group < 2; ++group) {
    cp_async_16(shared + 4 * group, from + 4 * group, valid);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  for (int i = 0; i < 8; ++i) out[i] = shared[i];
  cp_async_wait<0>();
}

void test_copies() {
  alignas(16) const float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const float* p = from;
  std::vector<float> out(8);
  launch(copies<0>, "copies", 1, 1, 32, nullptr, p, out.data(), true);
  for (int i = 0; i < 8; ++i) expect(out[i] == from[i], "copies that were waited for");
  launch(copies<1>, "copies", 1, 1, 32, nullptr, p, out.data(), true);
  expect(out[3] == 4.0f && std::isnan(out[4]), "a group that is pending has not arrived");
  launch(copies<0>, "copies", 1, 1, 32, nullptr, p, out.data(), false);
  for (int i = 0; i < 8; ++i) expect(out[i] == 0.0f, "copies of nothing are zeros");
}

// Four matrices, element (r, c) of matrix i being 64 i + 8 r + c.
__global__ void matrices(uint32_t* out) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int c = 0; c < 8; ++c) shared[8 * lane + c] = static_cast<uint16_t>(8 * lane + c);
  __syncwarp();
  uint32_t plain[4], transposed[4];
  ldmatrix_x4(plain, shared + 8 * lane);
  ldmatrix_x4_trans(transposed, shared + 8 * lane);
  for (int i = 0; i < 4; ++i) {
    out[8 * lane + i] = plain[i];
    out[8 * lane + 4 + i] = transposed[i];
  }
}

void test_ldmatrix() {
  std::vector<uint32_t> out(8 * 32);
  launch(matrices, "matrices", 1, 32, 512, nullptr, out.data());
  // The figure of the PTX ISA: threads 0 to 3 hold row 0, threads 4 to 7 row 1, two elements each.
  expect(out[8 * 5 + 1] == ((64 + 8 + 2) | (64 + 8 + 3) << 16), "ldmatrix, lane 5, matrix 1");
  expect(out[8 * 31] == (62 | 63 << 16), "ldmatrix, lane 31");
  expect(out[8 * 5 + 4] == (17 | 25 << 16), "ldmatrix.trans, lane 5: column 1, rows 2 and 3");
  expect(out[8 * 30 + 7] == ((192 + 39) | (192 + 47) << 16), "ldmatrix.trans, lane 30, matrix 3");
}

// Fragments filled by the formulas of the PTX ISA ("Matrix fragments for mma.m16n8k16"), where
// register element i of a is at row g (i < 2 or 4 <= i < 6) or g + 8, column 2 t + (i & 1), + 8
// from i = 4 on; of b at row 2 t + (i & 1), + 8 from i = 2 on, column g; of c at row g (i < 2) or
// g + 8, column 2 t + (i & 1).
template <typename T>
__global__ void product(const float* a, const float* b, float* c) {
  const int g = threadIdx.x >> 2, t = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? g : g + 8;
    const float* p = a + row * 16 + 2 * t + (i >= 4 ? 8 : 0);
    fragment_a[i / 2] = pack<T>(p[0], p[1]);
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = 2 * t + (i >= 2 ? 8 : 0);
    fragment_b[i / 2] = pack<T>(b[row * 8 + g], b[(row + 1) * 8 + g]);
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(i < 2 ? g : g + 8) * 8 + 2 * t + (i & 1)];
  mma_m16n8k16<T>(d, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? g : g + 8) * 8 + 2 * t + (i & 1)] = d[i];
}

template <typename T>
void test_mma(const char* name) {
  std::vector<float> a(16 * 16), b(16 * 8), c(16 * 8);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>((i * 37) % 17 - 8);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>((i * 29) % 13 - 6);
  for (int i = 0; i < 128; ++i) c[i] = static_cast<float>(i);
  launch(product<T>, name, 1, 32, 0, nullptr, static_cast<const float*>(a.data()),
         static_cast<const float*>(b.data()), c.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = static_cast<float>(row * 8 + column);
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 8 + column];
      expect(c[row * 8 + column] == sum, std::string("mma ") + name);
    }
  }
}

// Every warp adds its number, in the order in which warps run.
__global__ void order(int* out, int* count) {
  if (threadIdx.x % 32 == 0) out[atomicAdd(count, 1)] = threadIdx.x / 32;
}

void test_orders() {
  bool differ = false;
  for (unsigned seed = 0; seed < 4; ++seed) {
    std::vector<int> out(8);
    int count = 0;
    longrope_emulator::Machine::instance().order_seed = seed;
    launch(order, "order", 1, 256, 0, nullptr, out.data(), &count);
    expect(count == 8, "all warps ran");
    for (int i = 0; i < 8; ++i) differ = differ || out[i] != i;
    if (seed == 0) expect(!differ, "the first order is that of their numbers");
  }
  longrope_emulator::Machine::instance().order_seed = 0;
  expect(differ, "seeds draw other orders");
}

}  // namespace

int main() {
  test_indices();
  test_barrier_and_poison();
  test_errors();
  test_shuffles();
  test_copies();
  test_ldmatrix();
  test_mma<BFloat16>("bf16");
  test_mma<Float16>("fp16");
  test_orders();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
