// Writing new keys and values into a cache: a copy of rows, or their float8.
#include "append.h"

#include <cstring>

#include "../append.h"
#include "element.h"

namespace {
namespace longrope {

using longrope_calls::ElementType;
using longrope_calls::Scales;
using longrope_calls::TokenRows;

template <typename T>
void quantise_row(const T* in, uint8_t* out, int64_t dim, float scale) {
  for (int64_t d = 0; d < dim; ++d) out[d] = float8_of(widen(in[d]) / scale);
}

// The heads of one token of k or v.
template <typename T>
void append_token(const AppendCall& a, const TokenRows& from, const TokenRows& to,
                  const Scales& scales, int64_t batch, int64_t token, const AppendPlace& place) {
  const int64_t size = a.cache_is_float8 ? 1 : sizeof(T);
  const T* in = static_cast<const T*>(from.data) + batch * from.strides[0] +
                token * from.strides[1];
  char* out = static_cast<char*>(to.data) +
              (place.row * to.strides[0] + place.slot * to.strides[1]) * size;
  for (int64_t head = 0; head < a.heads; ++head) {
    char* const row = out + head * to.strides[2] * size;
    if (a.cache_is_float8) {
      const float scale = scales.data == nullptr ? 1.0f : scales.data[head * scales.stride];
      quantise_row(in + head * from.strides[2], reinterpret_cast<uint8_t*>(row), a.dim, scale);
    } else {
      std::memcpy(row, in + head * from.strides[2], static_cast<size_t>(a.dim * size));
    }
  }
}

template <typename T>
void append_of(const AppendCall& a, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < a.batch * a.tokens; ++i) {
    const int64_t batch = i / a.tokens, token = i % a.tokens;
    const AppendPlace place = place_of_token(a, batch, token);
    if (place.row < 0) continue;
    append_token<T>(a, a.k, a.cache.k, a.cache.k_scale, batch, token, place);
    append_token<T>(a, a.v, a.cache.v, a.cache.v_scale, batch, token, place);
  }
}

}  // namespace longrope
}  // namespace

namespace longrope_cpu {

void append(const longrope_calls::AppendCall& a, int threads) {
  switch (a.type) {
    case longrope_calls::ElementType::kFloat32:
      return longrope::append_of<float>(a, threads);
    case longrope_calls::ElementType::kBFloat16:
      return longrope::append_of<longrope::BFloat16>(a, threads);
    case longrope_calls::ElementType::kFloat16:
      return longrope::append_of<longrope::Float16>(a, threads);
  }
}

}  // namespace longrope_cpu
