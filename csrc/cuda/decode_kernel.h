// Split-KV decoding: the kernel that attends.
//
// A block takes kDecodeRows rows, queries of the heads that share a KV head, and a split of the
// keys, which its warps share out in tiles of 16: each key is loaded and rotated once for all rows.
// Scores are keys times queries and the output is values times weights, so that keys and values are
// the matrix unit's operand of 16 rows, as they come from memory, and the few queries that of 8
// columns. Not measured on a GPU yet.
#pragma once

#include <cmath>
#include <type_traits>

#include "decode_block.h"
#include "decode_splits.h"
#include "decode_tile.h"

namespace {
namespace longrope {

template <typename T, int kDim, bool kFloat8>
class DecodeBlock {
 public:
  using Element = std::conditional_t<kFloat8, Float8, T>;
  static constexpr int kChunks = kDim / 64;  // of 16 dimensions, of a lane
  static constexpr bool kLoadsAhead = kFloat8 || kDim < 256;

  __device__ __forceinline__ DecodeBlock(const DecodeCall& arguments, const DecodePlan& plan)
      : a_(arguments),
        plan_(plan),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        n_(lane_ / 4),
        c_(lane_ % 4) {
    const int32_t units = a_.batch * a_.kv_heads * plan_.row_blocks;
    const int32_t unit = static_cast<int32_t>(blockIdx.x) % units;
    sequence_ = unit / (a_.kv_heads * plan_.row_blocks);
    kv_head_ = unit / plan_.row_blocks % a_.kv_heads;
    unsigned char* const memory = dynamic_shared();
    steps_ = reinterpret_cast<uint64_t*>(memory);
    queries_ = reinterpret_cast<Words<4>*>(memory + Shared<kDim>::kSteps);
    unsigned char* const of_warps = memory + Shared<kDim>::kSteps + Shared<kDim>::kQueries;
    sums_ = reinterpret_cast<float*>(of_warps);
    staged_ = reinterpret_cast<Element*>(of_warps + warp_ * Shared<kDim>::kOfWarp);
    unsigned char* const states = of_warps + kWarps * Shared<kDim>::kOfWarp;
    states_ = reinterpret_cast<float2*>(states);
    frame_ = reinterpret_cast<Frame*>(states + Shared<kDim>::kStates);
  }

  __device__ __forceinline__ void run() {
    const int32_t units = a_.batch * a_.kv_heads * plan_.row_blocks;
    const int32_t programs = units * plan_.splits.most;  // for each set
    const int32_t split = static_cast<int32_t>(blockIdx.x) % programs / units;
    range_ = keys_of_sequence(a_, plan_.splits, plan_.window, sequence_, lane_);
    if (split >= range_.splits) return;
    const int32_t first_row =
        static_cast<int32_t>(blockIdx.x) % plan_.row_blocks * kDecodeRows;
    int32_t set;
    const uint32_t queries =
        queries_of_set(static_cast<int32_t>(blockIdx.x) / programs, first_row, set);
    if (queries == 0) return;
    begin_ = range_.first + split * range_.each;
    end_ = min(begin_ + range_.each, range_.high);
    if (threadIdx.x == 0) {
      *frame_ = {a_.tables.n_hat[set], static_cast<float>(a_.tables.attention_factor[set]),
                 split, range_.splits, first_row, queries, 0};
    }
    load_steps(set);
    __syncthreads();
    load_queries();
    __syncthreads();
    attend();
    __syncthreads();
    combine();
    if (range_.splits > 1) combine_if_last();
  }

 private:
  // ------------------------------------------------------------------------------------ the start

  // The set of this block, and which queries of its rows take it, from the first row on.
  __device__ __forceinline__ uint32_t queries_of_set(int32_t of_block, int32_t first_row,
                                                     int32_t& set) const {
    const int32_t tokens = range_.high - range_.start - a_.queries + 1;  // up to query 0
    const int32_t groups = a_.heads / a_.kv_heads;
    const int32_t first = first_row / groups;
    const int32_t last = min((first_row + kDecodeRows - 1) / groups, a_.queries - 1);
    if (!plan_.several_sets) {
      set = static_cast<int32_t>(set_of_query(a_.tables, a_.selection, sequence_, 0, tokens));
      return ~0u;
    }
    set = of_block;
    uint32_t queries = 0;
#pragma unroll 1
    for (int32_t t = first; t <= last; ++t) {
      const int64_t of_query =
          set_of_query(a_.tables, a_.selection, sequence_, t, tokens + t);
      if (of_query == set) queries |= 1u << (t - first);
    }
    return queries;
  }

  __device__ __forceinline__ void load_steps(int64_t set) {
    const int32_t pairs = static_cast<int32_t>(a_.tables.pairs);
    const uint64_t* const steps = a_.tables.steps + 2 * set * pairs;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kDim; i += kThreads) {
      const int32_t row = i / (kDim / 2), pair = i % (kDim / 2);
      steps_[row * (kDim / 2) + place_of_step(pair)] =
          pair < pairs ? steps[row * pairs + pair] : 0;
    }
  }

  // The pairs of a chunk that a lane turns are those below `pairs`.
  __device__ __forceinline__ int32_t rotated_of(int32_t chunk) const {
    return static_cast<int32_t>(a_.tables.pairs) - 8 * chunk;
  }

  __device__ __forceinline__ void rotate(Words<4>& x, Words<4>& y, int i, int32_t position) const {
    const int32_t rotated = rotated_of(4 * i + c_);
    if (rotated <= 0) return;
    const bool original = below_threshold(position, frame_->n_hat);
    const Words<4>* const steps = reinterpret_cast<const Words<4>*>(steps_) +
                                  (original ? 0 : kDim / 4) + 16 * i + c_;
    rotate_chunk<T>(x, y, position, original ? 1.0f : frame_->factor, steps, rotated);
  }

  // Rotated queries to shared memory, each lane those that it takes back. Warps take chunks.
  __device__ __forceinline__ void load_queries() {
    const RowOf row = row_at(a_, kv_head_, frame_->first_row + n_);
    const int32_t slot = range_.high - a_.queries + row.query;
    const int32_t position =
        row.exists && (a_.keys.positions.data == nullptr || slot >= 0)
            ? position_of_slot(a_, sequence_, range_.start, slot)
            : 0;
    const T* const q = static_cast<const T*>(a_.q.data) + sequence_ * a_.q.strides[0] +
                       row.query * a_.q.strides[1] + row.head * a_.q.strides[2];
#pragma unroll 1
    for (int32_t i = warp_; i < kChunks; i += kWarps) {
      Words<4> x = no_words<4>(), y = no_words<4>();
      if (row.exists) {
#pragma unroll
        for (int32_t e = 0; e < 8; ++e) {
          const int32_t d_x = dimension_of(a_, 4 * i + c_, e);
          const int32_t d_y = dimension_of(a_, 4 * i + c_, e + 8);
          if (d_x >= 0) x.at[e / 2] |= static_cast<uint32_t>(q[d_x].bits) << (e % 2 * 16);
          if (d_y >= 0) y.at[e / 2] |= static_cast<uint32_t>(q[d_y].bits) << (e % 2 * 16);
        }
      }
      if (a_.tables.interleaved) part_pairs(x, y);
      rotate(x, y, i, position);
      queries_[(2 * i) * 32 + lane_] = x;
      queries_[(2 * i + 1) * 32 + lane_] = y;
    }
  }

  // ------------------------------------------------------------------------------------- the tiles

  struct Keys {
    Raw<kFloat8> x[2][kChunks];
    Raw<kFloat8> y[2][kChunks];
    int32_t position[2];
  };

  struct Values {
    Raw<kFloat8> at[4][kChunks];
  };

  __device__ __forceinline__ bool exists(int32_t j) const { return j >= range_.low && j < end_; }

  __device__ __forceinline__ Slot slot_of_tile(int32_t j0) const {
    return slot_of_lane(a_, plan_.block_size, sequence_, j0, range_.low, end_, lane_);
  }

  __device__ __forceinline__ static Raw<kFloat8> load_piece(const Element* p) {
    return load_streaming<kFloat8 ? 2 : 4>(p);
  }

  __device__ __forceinline__ void load_keys(int32_t j0, const Slot& slots, Keys& keys) const {
    const Element* const head =
        static_cast<const Element*>(a_.keys.k.data) + kv_head_ * a_.keys.k.strides[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t j = j0 + n_ + 8 * i;
      keys.position[i] = exists(j) ? position_of_slot(a_, sequence_, range_.start, j) : 0;
    }
    if (!plan_.keys_are_wide) {
      stage_tile<kDim>(staged_, head, a_.keys.k.strides, slots, j0, range_.low, end_, lane_,
                       [&](int32_t i) { return dimension_of(a_, i / 16, i % 16); });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t key = n_ + 8 * i;
      const Element* const row = row_of_key(head, a_.keys.k.strides, slots, key);
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        keys.x[i][k] = keys.y[i][k] = no_words<kFloat8 ? 2 : 4>();
        const int32_t chunk = 4 * k + c_;
        if (!plan_.keys_are_wide) {
          const Words<kFloat8 ? 2 : 4>* const pieces =
              reinterpret_cast<const Words<kFloat8 ? 2 : 4>*>(staged_ + key * kDim + 16 * chunk);
          keys.x[i][k] = pieces[0];
          keys.y[i][k] = pieces[1];
        } else if (exists(j0 + key)) {
          const int32_t d_x = dimension_of(a_, chunk, 0), d_y = dimension_of(a_, chunk, 8);
          if (d_x >= 0) keys.x[i][k] = load_piece(row + d_x);
          if (d_y >= 0) keys.y[i][k] = load_piece(row + d_y);
        }
      }
    }
  }

  __device__ __forceinline__ void load_values(int32_t j0, const Slot& slots,
                                              Values& values) const {
    const Element* const head =
        static_cast<const Element*>(a_.keys.v.data) + kv_head_ * a_.keys.v.strides[2];
    if (!plan_.values_are_wide) {
      stage_tile<kDim>(staged_, head, a_.keys.v.strides, slots, j0, range_.low, end_, lane_,
                       [&](int32_t i) { return i < a_.dim ? i : -1; });
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t key = 2 * c_ + i % 2 + i / 2 * 8;
      const Element* const row = row_of_key(head, a_.keys.v.strides, slots, key);
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        values.at[i][k] = no_words<kFloat8 ? 2 : 4>();
        const int32_t d = 64 * k + 8 * n_;
        if (!plan_.values_are_wide) {
          values.at[i][k] =
              *reinterpret_cast<const Words<kFloat8 ? 2 : 4>*>(staged_ + key * kDim + d);
        } else if (exists(j0 + key) && d < a_.dim) {
          values.at[i][k] = load_piece(row + d);
        }
      }
    }
  }

  // Products of keys n and n + 8 (scores 0, 1 and 2, 3) with queries 2 c and 2 c + 1.
  __device__ __forceinline__ void score(const Keys& keys, float (&scores)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      Words<4> x[2], y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[i] = elements_of<T>(keys.x[i][k]);
        y[i] = elements_of<T>(keys.y[i][k]);
        if (a_.tables.interleaved) part_pairs(x[i], y[i]);
        rotate(x[i], y[i], k, keys.position[i]);
      }
      const Words<4> q_x = queries_[(2 * k) * 32 + lane_];
      const Words<4> q_y = queries_[(2 * k + 1) * 32 + lane_];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a_x[4] = {x[0].at[i], x[1].at[i], x[0].at[i + 1], x[1].at[i + 1]};
        mma_m16n8k16<T>(scores, a_x, q_x.at[i], q_x.at[i + 1]);
        const uint32_t a_y[4] = {y[0].at[i], y[1].at[i], y[0].at[i + 1], y[1].at[i + 1]};
        mma_m16n8k16<T>(scores, a_y, q_y.at[i], q_y.at[i + 1]);
      }
    }
  }

  // Scores to weights under the new maxima of the rows; sums_ of this lane's rows follow them.
  __device__ __forceinline__ void weigh(int32_t j0, float (&scores)[4]) {
    float largest[2] = {top_[0], top_[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t j = j0 + n_ + i / 2 * 8;
      const int32_t slot = slot_[i % 2];
      const bool seen =
          exists(j) && j <= slot && (plan_.window == 0 || slot - j < plan_.window);
      float score = scores[i] * scale_;
      if (plan_.cap > 0.0f) score = plan_.cap - 2.0f * plan_.cap / (exp2_approx(score) + 1.0f);
      scores[i] = seen ? score : -INFINITY;
      largest[i % 2] = fmaxf(largest[i % 2], scores[i]);
    }
    bool rescales = false;
    float alpha[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = largest_of_keys(largest[i]);
      alpha[i] = exp2_approx(top_[i] - base_of(largest[i]));
      rescales = rescales || largest[i] != top_[i];
      top_[i] = largest[i];
      total_[i] *= alpha[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = exp2_approx(scores[i] - base_of(top_[i % 2]));
      total_[i % 2] += scores[i];
    }
    if (__any_sync(kAllLanes, rescales)) {
#pragma unroll
      for (int k = 0; k < kChunks; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r) out_[k][i][r] *= alpha[r % 2];
    }
  }

  // Keys down the columns: of weights (key n, rows 2 c and 2 c + 1) those of keys 2 c and 2 c + 1
  // for row n.
  __device__ __forceinline__ uint32_t transposed(uint32_t weights) const {
    const uint32_t low = __shfl_sync(kAllLanes, weights, 8 * c_ + n_ / 2);
    const uint32_t high = __shfl_sync(kAllLanes, weights, 8 * c_ + 4 + n_ / 2);
    return permute_bytes(low, high, n_ % 2 == 0 ? kLowHalves : kHighHalves);
  }

  __device__ __forceinline__ void add_values(const Values& values, const float (&weights)[4]) {
    const uint32_t p0 = transposed(pack<T>(weights[0], weights[1]));
    const uint32_t p1 = transposed(pack<T>(weights[2], weights[3]));
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      Words<4> v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = elements_of<T>(values.at[i][k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Rows n and n + 8 of the product are dimensions 2 i and 2 i + 1 of the eight of the lane.
        const uint32_t of_v[4] = {permute_bytes(v[0].at[i], v[1].at[i], kLowHalves),
                                  permute_bytes(v[0].at[i], v[1].at[i], kHighHalves),
                                  permute_bytes(v[2].at[i], v[3].at[i], kLowHalves),
                                  permute_bytes(v[2].at[i], v[3].at[i], kHighHalves)};
        mma_m16n8k16<T>(out_[k][i], of_v, p0, p1);
      }
    }
  }

  __device__ __forceinline__ void attend() {
    scale_ = plan_.scale;
    const Scales& k_scale = a_.keys.k_scale;
    if (k_scale.data != nullptr) scale_ *= k_scale.data[kv_head_ * k_scale.stride];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowOf row = row_at(a_, kv_head_, frame_->first_row + 2 * c_ + i);
      slot_[i] = range_.high - a_.queries + row.query;
      top_[i] = -INFINITY;
      total_[i] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) out_[k][i][r] = 0.0f;

    // Keys and values are loaded a tile ahead, as soon as their registers are free; where they take
    // too many, one after the other. The blocks of a tile are known one tile ahead of its keys.
    int32_t j0 = begin_ + warp_ * kKeys;
    Keys keys;
    Values values;
    Slot slots = slot_of_tile(j0);
    load_keys(j0, slots, keys);
    if (kLoadsAhead) load_values(j0, slots, values);
    Slot next = slot_of_tile(j0 + kDecodeTile);
#pragma unroll 1
    for (; j0 < end_; j0 += kDecodeTile) {
      float scores[4];
      score(keys, scores);
      if (kLoadsAhead) {
        load_keys(j0 + kDecodeTile, next, keys);
      } else {
        load_values(j0, slots, values);
      }
      weigh(j0, scores);
      add_values(values, scores);
      if (kLoadsAhead) {
        load_values(j0 + kDecodeTile, next, values);
      } else {
        load_keys(j0 + kDecodeTile, next, keys);
      }
      slots = next;
      next = slot_of_tile(j0 + 2 * kDecodeTile);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = 2 * c_ + i;
      total_[i] = sum_of_keys(total_[i]);
      if (n_ == 0) states_[warp_ * kDecodeRows + row] = make_float2(top_[i], total_[i]);
#pragma unroll
      for (int k = 0; k < kChunks; ++k)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sums_[(warp_ * kDecodeRows + row) * kDim + 64 * k + 8 * n_ + e] =
              out_[k][e / 2][e % 2 * 2 + i];
        }
    }
  }

  // --------------------------------------------------------------------------------------- the end

  __device__ __forceinline__ bool takes_part(int32_t query) const {
    const int32_t first_query = frame_->first_row / (a_.heads / a_.kv_heads);
    return (frame_->queries >> (query - first_query) & 1u) != 0;
  }

  // The rows of this block, where it is the last of those that have their splits.
  __device__ __forceinline__ void combine_if_last() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int32_t units = a_.batch * a_.kv_heads * plan_.row_blocks;
      const int32_t block = static_cast<int32_t>(blockIdx.x);
      int32_t* const count =
          plan_.splits.counters + block / (units * plan_.splits.most) * units + block % units;
      frame_->is_last = atomicAdd(count, 1) == frame_->splits - 1;
      if (frame_->is_last) *count = 0;
    }
    __syncthreads();
    if (!frame_->is_last) return;
    __threadfence();
#pragma unroll 1
    for (int32_t row = warp_; row < kDecodeRows; row += kWarps) {
      const RowOf of = row_at(a_, kv_head_, frame_->first_row + row);
      if (!of.exists || !takes_part(of.query)) continue;
      combine_row<T>(a_, plan_.splits, frame_->splits, sequence_, of.head, of.query, lane_);
    }
  }

  // The sums of the warps become those of the block.
  __device__ __forceinline__ void combine() {
    const Scales& v_scale = a_.keys.v_scale;
    const float value_scale =
        v_scale.data == nullptr ? 1.0f : v_scale.data[kv_head_ * v_scale.stride];
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kDecodeRows * kDim; i += kThreads) {
      const int32_t row = i / kDim, d = i % kDim;
      const RowOf of = row_at(a_, kv_head_, frame_->first_row + row);
      if (!of.exists || d >= a_.dim) continue;
      if (!takes_part(of.query)) continue;
      float top = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, states_[w * kDecodeRows + row].x);
      float total = 0.0f, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 state = states_[w * kDecodeRows + row];
        const float weight = exp2_approx(state.x - base_of(top));
        total += weight * state.y;
        sum += weight * sums_[(w * kDecodeRows + row) * kDim + d];
      }
      const float divisor = total == 0.0f ? 1.0f : total;
      sum *= value_scale / divisor;
      const float lse = top + log2f(divisor);
      const int64_t place =
          (static_cast<int64_t>(sequence_) * a_.heads + of.head) * a_.queries + of.query;
      if (frame_->splits == 1) {
        T* const out = static_cast<T*>(a_.out.data) + sequence_ * a_.out.strides[0] +
                       of.query * a_.out.strides[1] + of.head * a_.out.strides[2];
        out[d].bits = static_cast<uint16_t>(pack<T>(sum, 0.0f));
        if (d == 0) a_.lse[place] = lse * kLn2;
      } else {
        const int64_t rows = static_cast<int64_t>(a_.batch) * a_.heads * a_.queries;
        const int64_t partial = frame_->split * rows + place;
        plan_.splits.out[partial * a_.dim + d] = sum;
        if (d == 0) plan_.splits.lse[partial] = lse;
      }
    }
  }

  const DecodeCall& a_;
  const DecodePlan& plan_;
  const int32_t lane_;
  const int32_t warp_;
  const int32_t n_;
  const int32_t c_;
  int32_t sequence_;
  int32_t kv_head_;
  KeyRange range_;
  int32_t begin_;
  int32_t end_;
  float scale_;
  uint64_t* steps_;
  Words<4>* queries_;
  float* sums_;
  Element* staged_;
  float2* states_;
  Frame* frame_;
  // Of rows 2 c and 2 c + 1.
  int32_t slot_[2];
  float top_[2];
  float total_[2];
  float out_[kChunks][4][4];
};

// Grid: splits slowest, so that those that are not live come last. Where queries of a sequence may
// differ in their factor sets, as many for each set, of which those without a query end at once.
template <typename T, int kDim, bool kFloat8>
__global__ void __launch_bounds__(kThreads, kBlocks<kDim>)
    decode_kernel(const __grid_constant__ DecodeCall a,
                  const __grid_constant__ DecodePlan plan) {
  DecodeBlock<T, kDim, kFloat8> block(a, plan);
  block.run();
}

}  // namespace longrope
}  // namespace
