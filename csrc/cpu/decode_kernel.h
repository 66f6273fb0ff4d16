// Attention to a cache of unrotated keys; compiled once for each instruction set, over the vector
// type included before it.
//
// A sequence is cut into splits of keys, which threads take one by one; a split goes through its
// keys in tiles. The cosines and sines of a key are computed once and serve all KV heads, and each
// rotated key serves all queries of its group, from registers where these are few, so that the
// work stays near the time that memory takes to deliver keys and values. Queries of one sequence
// that take different factor sets are parts of their own, each with its keys, and so are some tens
// of the queries of a prompt: they meet the keys of a tile head by head, each head's keys rotated
// for all of them, so that products outweigh everything else. All arithmetic is in float32, but
// for the products of such prompts in bfloat16 where the processor has instructions for them, which
// sum in float32. Splits depend on the lengths alone and are combined in order: the number of
// threads changes no bit of the result.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "decode_pairs.h"
#include "decode_parts.h"
#include "decode_tile.h"
#include "key_angles.h"

namespace {
namespace longrope {

using longrope_calls::ElementType;

constexpr int64_t kWidened = 16;     // keys whose values are widened before they are summed up
constexpr int kKeyRows = 8;          // of a KV head, at most, where keys are rotated in registers

// One thread's scratch memory, and the work that it does in it.
template <bool kInterleaved, typename T>
class Worker {
  static constexpr bool kPairs = kMultipliesPairs<T>;

 public:
  Worker(const DecodeCall& a, const Layout& layout)
      : a_(a),
        layout_(layout),
        groups_(a.kv_heads > 0 ? a.heads / a.kv_heads : 0),
        // Never 0, which would make NaN of the top of a row that sees nothing.
        scale_(std::max(
            static_cast<float>(kLog2E * (a.scores.cap > 0.0 ? a.scores.cap : a.scores.scale)),
            std::numeric_limits<float>::min())),
        angles_(a.tables),
        many_(a.queries > kFewQueries),
        cos_((many_ ? kTile : kGroup) * layout.row),
        sin_((many_ ? kTile : kGroup) * layout.row),
        turned_((many_ ? kTile : kGroup) * layout.padded),
        columns_(many_ && !kPairs ? kTile * layout.padded : 0),
        scores_((many_ ? groups_ : a.heads) * most_queries(a) * kTile),
        sum_(layout.values),
        widened_(widens_values(groups_ * most_queries(a)) ? kWidened * layout.values : 0),
        pairs_(layout, many_ ? a.heads * most_queries(a) : 0,
               many_ ? groups_ * most_queries(a) : 0) {
    // The padding of these meets that of keys, and 0 times NaN is NaN.
    for (Floats* x : {&cos_, &sin_, &turned_}) x->fill(0.0f);
    for (int64_t j = 0; j < kWidened; ++j) widened_rows_[j] = widened_.at(j * layout.values);
    for (int64_t c = 0; many_ && !kPairs && c < layout.padded; ++c) {
      columns_rows_.push_back(columns_.at(c * kTile));
    }
  }

  // Rotates query t of a part, all heads of it, into its rows of q.
  void turn_query(const Part& s, int64_t t, float* q) {
    const int64_t position = position_at(a_, s.sequence, s.first_slot + t, s.start);
    cos_sin_row(a_.tables, position, s.set, false, cos_.at(0), sin_.at(0));
    const T* const in = static_cast<const T*>(a_.q.data) + s.sequence * a_.q.strides[0] +
                        (s.first_query + t) * a_.q.strides[1];
    for (int64_t h = 0; h < a_.heads; ++h) {
      float* const row = q + (h * s.queries + t) * layout_.padded;
      turn_row<kInterleaved>(in + h * a_.q.strides[2], row, cos_.at(0), sin_.at(0), layout_);
    }
  }

  // Attends to the keys of one split; sums (rows, values) and states (rows) are the result.
  void attend(const Part& s, const Item& item, const float* q, float* sums, Softmax* states) {
    const int64_t rows = a_.heads * s.queries;
    group_rows_ = groups_ * s.queries;
    widens_values_ = widens_values(group_rows_);
    std::fill(sums, sums + rows * layout_.values, 0.0f);
    std::fill(states, states + rows, Softmax{-kInfinity, 0.0f});
    angles_.forget();
    if constexpr (kPairs) {
      if (many_) pairs_.take_queries(q, rows);
    }
    for (int64_t begin = item.begin; begin < item.end; begin += kTile) {
      const int64_t keys = std::min(kTile, item.end - begin);
      known_ = std::min(kTile + kGroup, item.end - begin);
      for (int64_t j = 0; j < known_; ++j) find_slot(s.sequence, begin + j, j);
      if (many_) {
        attend_by_heads(s, begin, keys, q, sums, states);
        continue;
      }
      for (int64_t g = 0; g < keys; g += kGroup) {
        score_group(s, begin, g, std::min(kGroup, keys - g), q);
      }
      for (int64_t row = 0; row < rows; ++row) {
        weigh_row(s, begin, keys, row, scores_.at(row * kTile), sums + row * layout_.values,
                  states[row]);
      }
      const int64_t most = widens_values_ ? kWidened : kTile;
      for (int64_t g = 0; g < keys; g += most) {
        for (int64_t h = 0; h < a_.kv_heads; ++h) {
          add_values(h, g, std::min(most, keys - g), scores_.at(h * group_rows_ * kTile + g), sums);
        }
      }
    }
  }

  // Combines the splits of a part for one row, and writes the result.
  void combine(const Part& s, int64_t row, const float* sums, const Softmax* states) {
    const int64_t rows = a_.heads * s.queries;
    float top = -kInfinity;
    for (int64_t i = 0; i < s.items; ++i) top = std::max(top, states[i * rows + row].top);
    const int64_t h = row / s.queries, t = s.first_query + row % s.queries;
    const float base = finite(top), sink = sink_of(h);
    float shift = top * scale_;
    const int64_t width = layout_.values;
    // To the largest score; a sink above that one becomes the base of all.
    float total = 0.0f, of_scores = 1.0f;
    if (sink > shift) {
      of_scores = exp2_of(shift - sink);
      shift = sink;
      total = 1.0f;
    } else if (sink != -kInfinity) {
      total = exp2_of(sink - shift);
    }
    const auto weight_of = [&](int64_t i) {
      return exp2_of((states[i * rows + row].top - base) * scale_) * of_scores;
    };
    for (int64_t i = 0; i < s.items; ++i) total += weight_of(i) * states[i * rows + row].total;
    const bool none = total == 0.0f;
    const float* sum = sums + row * width;  // of one split, whose weight is 1
    if (none || s.items > 1 || sink != -kInfinity) {
      float* const of_all = sum_.at(0);
      std::fill(of_all, of_all + width, 0.0f);
      for (int64_t i = 0; i < (none ? 0 : s.items); ++i) {
        const float weight = weight_of(i);
        const float* const part = sums + (i * rows + row) * width;
        for (int64_t c = 0; c < width; ++c) of_all[c] += weight * part[c];
      }
      sum = of_all;
    }
    const Vec of_total = splat(none ? 0.0f : 1.0f / total);
    T* const out = static_cast<T*>(a_.out.data) + s.sequence * a_.out.strides[0] +
                   t * a_.out.strides[1] + h * a_.out.strides[2];
    int64_t c = 0;
    for (; c + 2 * kWidth <= a_.dim; c += 2 * kWidth) {
      store_two(out + c, multiply(load(sum + c), of_total),
                multiply(load(sum + c + kWidth), of_total));
    }
    for (; c < a_.dim; c += kWidth) {
      T vector[kWidth];
      store(vector, multiply(load(sum + c), of_total));
      std::memcpy(out + c, vector, std::min<size_t>(kWidth, a_.dim - c) * sizeof(T));
    }
    a_.lse[(s.sequence * a_.heads + h) * a_.queries + t] =
        none ? -kInfinity : static_cast<float>((shift + std::log2(double{total})) / kLog2E);
  }

 private:
  // To base 2, finite from above, since a difference of infinities is no number; -inf for none.
  float sink_of(int64_t head) const {
    if (a_.sinks.data == nullptr) return -kInfinity;
    return std::min(a_.sinks.data[head * a_.sinks.stride], 1e38f) * static_cast<float>(kLog2E);
  }

  bool widens_values(int64_t group_rows) const {
    return a_.dim % kWidth != 0 ||
           (group_rows > 2 * kRowBlock && (many_ || !std::is_same<T, float>::value));
  }

  void find_slot(int64_t sequence, int64_t slot, int64_t j) {
    int64_t outer = sequence, inner = slot;
    if (a_.keys.block_table.data != nullptr) {
      outer = element(a_.keys.block_table, sequence, slot / a_.keys.slots);
      inner = slot % a_.keys.slots;
    }
    keys_[j] = static_cast<const T*>(a_.keys.k.data) + outer * a_.keys.k.strides[0] +
               inner * a_.keys.k.strides[1];
    values_[j] = static_cast<const T*>(a_.keys.v.data) + outer * a_.keys.v.strides[0] +
                 inner * a_.keys.v.strides[1];
  }

  // A tile for many queries, one KV head after the other.
  void attend_by_heads(const Part& s, int64_t begin, int64_t keys, const float* q, float* sums,
                       Softmax* states) {
    const int64_t padded = layout_.padded, most = widens_values_ ? kWidened : kTile;
    for (int64_t g = 0; g < keys; g += kGroup) {
      find_angles(s, begin + g, std::min(kGroup, keys - g), g);
    }
    for (int64_t h = 0; h < a_.kv_heads; ++h) {
      for (int64_t j = 0; j < keys; ++j) {
        prefetch_ahead(h, j);
        turn_row<kInterleaved>(keys_[j] + h * a_.keys.k.strides[2], turned_.at(j * padded),
                               cos_.at(j * layout_.row), sin_.at(j * layout_.row), layout_);
      }
      const int64_t first = h * group_rows_;
      if constexpr (kPairs) {
        pairs_.take_keys(turned_.at(0));
        pairs_.score(first, group_rows_, scores_.at(0));
      } else {
        score_columns(q + first * padded);
      }
      for (int64_t row = 0; row < group_rows_; ++row) {
        float* const of_row = sums + (first + row) * layout_.values;
        weigh_row<kTile>(s, begin, keys, row, scores_.at(row * kTile), of_row, states[first + row]);
      }
      if constexpr (kPairs) {
        pairs_.take_values(values_, h * a_.keys.v.strides[2], keys, a_.dim);
        pairs_.add_values(scores_.at(0), group_rows_, sums + first * layout_.values);
        continue;
      }
      for (int64_t g = 0; g < keys; g += most) {
        add_values(h, g, std::min(most, keys - g), scores_.at(g), sums);
      }
    }
  }

  // The scores of all keys of the tile, turned before, with the rows of a KV head: a weighted sum of
  // the columns of the keys, which wants no sum within a vector.
  void score_columns(const float* q) {
    const int64_t padded = layout_.padded;
    transpose_tile(turned_.at(0), padded, columns_.at(0));
    std::fill(scores_.at(0), scores_.at(group_rows_ * kTile), 0.0f);
    add_rows(columns_rows_.data(), 0, 0, padded, q, padded, group_rows_, scores_.at(0), kTile);
  }

  // The cosines and sines of count <= kGroup keys from a slot on, from row `at`.
  void find_angles(const Part& s, int64_t slot, int64_t count, int64_t at) {
    int64_t positions[kGroup];
    for (int64_t j = 0; j < count; ++j) {
      positions[j] = position_at(a_, s.sequence, slot + j, s.start);
    }
    angles_.write(positions, count, s.set, cos_.at(at * layout_.row), sin_.at(at * layout_.row),
                  layout_.row);
  }

  // The scores of the keys [g, g + count) of the tile that begins at slot `begin`.
  void score_group(const Part& s, int64_t begin, int64_t g, int64_t count, const float* q) {
    find_angles(s, begin + g, count, 0);
    if constexpr (!kInterleaved && kRowBlock > 1) {
      const auto score = [&](auto fixed) { score_keys(fixed, g, count, q); };
      if (group_rows_ <= kKeyRows && with_fixed(layout_, score)) return;
    }
    score_rows(g, count, q);
  }

  // Key by key, in the order of memory; each is rotated in registers on its way to the few rows.
  template <typename Fixed>
  void score_keys(Fixed layout, int64_t g, int64_t count, const float* q) {
    with_constant<kKeyRows>(group_rows_, [&](auto rows) {
      const int64_t heads = a_.kv_heads, key_stride = a_.keys.k.strides[2];
      for (int64_t j = 0; j < count; ++j) {
        const T* key = keys_[g + j];
        const T* ahead = keys_[std::min(g + j + 1, known_ - 1)];
        const float* const cos = cos_.at(j * layout.row);
        const float* const sin = sin_.at(j * layout.row);
        const float* of_head = q;
        float* scores = scores_.at(g + j);
        // The other heads' by `add_values`, so that keys and values share the time there is.
        prefetch_row<2>(values_[g + j], layout.dim);
        for (int64_t h = 0; h < heads; ++h) {
          prefetch_row<3>(ahead, layout.dim);
          score_key<rows()>(key, of_head, cos, sin, layout, scores);
          key += key_stride;
          ahead += key_stride;
          of_head += rows() * layout.padded;
          scores += rows() * kTile;
        }
      }
    });
  }

  // The keys of a group are rotated into scratch memory, for any number of rows.
  void score_rows(int64_t g, int64_t count, const float* q) {
    const int64_t padded = layout_.padded;
    for (int64_t h = 0; h < a_.kv_heads; ++h) {
      for (int64_t j = 0; j < count; ++j) {
        prefetch_ahead(h, g + j);
        turn_row<kInterleaved>(keys_[g + j] + h * a_.keys.k.strides[2], turned_.at(j * padded),
                               cos_.at(j * layout_.row), sin_.at(j * layout_.row), layout_);
      }
      const int64_t end = (h + 1) * group_rows_;
      for (int64_t row = h * group_rows_; row < end; row += kRowBlock) {
        with_constant<kRowBlock>(end - row, [&](auto rows) {
          score_block<rows()>(q + row * padded, turned_.at(0), padded,
                              scores_.at(row * kTile + g));
        });
      }
    }
  }

  // Two streams at once, and the pauses in them while values are summed up, are more than hardware
  // foresees. Values of all heads are asked for here: by `add_values` alone narrow heads were
  // slower.
  LONGROPE_ALWAYS_INLINE void prefetch_ahead(int64_t h, int64_t j) {
    const int64_t next = std::min(j + kGroup, known_ - 1);
    prefetch_row<3>(keys_[next] + h * a_.keys.k.strides[2], a_.dim);
    prefetch_row<2>(values_[j] + h * a_.keys.v.strides[2], a_.dim);
  }

  // Hides what a row does not see, and turns its scores into weights.
  void weigh_row(const Part& s, int64_t begin, int64_t keys, int64_t row, float* scores,
                 float* sums, Softmax& state) {
    if (keys <= kShortTile) {
      weigh_row<kShortTile>(s, begin, keys, row, scores, sums, state);
    } else {
      weigh_row<kTile>(s, begin, keys, row, scores, sums, state);
    }
  }

  // kCount: keys of the tile, or more.
  template <int64_t kCount>
  void weigh_row(const Part& s, int64_t begin, int64_t keys, int64_t row, float* scores,
                 float* sums, Softmax& state) {
    if (a_.scores.cap > 0.0) {
      cap_scores<kCount>(scores, static_cast<float>(a_.scores.scale / a_.scores.cap));
    }
    const int64_t slot = s.first_slot + row % s.queries;
    const int64_t last = std::min(keys, slot + 1 - begin);
    const int64_t first = a_.scores.window > 0 ? slot - a_.scores.window + 1 - begin : 0;
    for (int64_t j = 0; j < std::min(first, kCount); ++j) scores[j] = -kInfinity;
    for (int64_t j = std::max<int64_t>(last, 0); j < kCount; ++j) scores[j] = -kInfinity;
    const float rescale = update_softmax<kCount>(scores, scale_, state);
    if (rescale != 1.0f) {
      for (int64_t c = 0; c < layout_.values; ++c) sums[c] *= rescale;
    }
  }

  // Adds the weighted values of the keys [g, g + count) of the tile, and asks for the next head's.
  void add_values(int64_t h, int64_t g, int64_t count, const float* weights, float* sums) {
    const int64_t offset = h * a_.keys.v.strides[2];
    const int64_t ahead = h + 1 < a_.kv_heads ? a_.keys.v.strides[2] : 0;
    float* const group_sums = sums + h * group_rows_ * layout_.values;
    if (widens_values_) {
      for (int64_t j = 0; j < count; ++j) {
        const T* const value = values_[g + j] + offset;
        if (ahead != 0) prefetch_row<2>(value + ahead, a_.dim);
        widen_row(value, a_.dim, widened_.at(j * layout_.values));
      }
      add_rows(widened_rows_, 0, 0, count, weights, kTile, group_rows_, group_sums, layout_.values);
    } else {
      add_rows(values_ + g, offset, ahead, count, weights, kTile, group_rows_, group_sums,
               layout_.values);
    }
  }

  const DecodeCall& a_;
  const Layout layout_;
  const int64_t groups_;  // heads of a KV head
  const float scale_;  // of scores, to base 2
  KeyAngles<T> angles_;
  const bool many_;    // queries: KV heads one by one, whole tiles of their keys rotated
  Floats cos_;         // (kGroup or kTile, row)
  Floats sin_;         // (kGroup or kTile, row)
  Floats turned_;      // (kGroup or kTile, padded)
  Floats columns_;     // (padded, kTile), where many
  Floats scores_;      // (rows of all KV heads or of one, kTile), then weights
  Floats sum_;         // (values,)
  Floats widened_;     // (kWidened, values), or nothing
  const float* widened_rows_[kWidened];
  std::conditional_t<kPairs, PairTile<Pair>, NoTile> pairs_;
  std::vector<const float*> columns_rows_;  // of columns_
  // Of the part.
  int64_t group_rows_;  // of a KV head
  bool widens_values_;
  int64_t known_;  // slots of the tile, and of the next group, that the two below hold
  const T* keys_[kTile + kGroup];
  const T* values_[kTile + kGroup];
};

// The steps in the order in which turn_vectors reads pairs.
template <bool kInterleaved, typename T>
std::vector<uint64_t> steps_in_order(const Tables& a) {
  std::vector<uint64_t> steps(a.steps, a.steps + 2 * a.sets * a.pairs);
  if (kInterleaved || !kEvenOdd<T>) return steps;
  for (int64_t row = 0; row < 2 * a.sets; ++row) {
    for (int64_t i = 0; i + 2 * kWidth <= a.pairs; i += 2 * kWidth) {
      const int64_t at = row * a.pairs + i;
      for (int64_t lane = 0; lane < 2 * kWidth; ++lane) {
        steps[at + lane] = a.steps[at + 2 * (lane % kWidth) + lane / kWidth];
      }
    }
  }
  return steps;
}

template <bool kInterleaved, typename T>
void decode_of(const DecodeCall& given, int threads) {
  DecodeCall a = given;
  const std::vector<uint64_t> steps = steps_in_order<kInterleaved, T>(given.tables);
  a.tables.steps = steps.data();
  const Layout layout(a.dim, a.tables.pairs);
  std::vector<Part> parts;
  std::vector<int64_t> part_of_query;
  std::vector<Item> items;
  int64_t item_rows = 0;
  for (int64_t sequence = 0; sequence < a.batch; ++sequence) add_parts(a, sequence, parts);
  const int64_t parts_of_sequence = (a.queries + most_queries(a) - 1) / most_queries(a);
  for (int64_t i = 0; i < static_cast<int64_t>(parts.size()); ++i) {
    part_of_query.insert(part_of_query.end(), parts[i].queries, i);
    item_rows = add_items(parts[i], i, parts_of_sequence, a.heads, item_rows, items);
  }
  const int64_t count = static_cast<int64_t>(items.size());
  const int64_t queries = int64_t{a.batch} * a.queries;
  Floats q(queries * a.heads * layout.padded);
  Floats sums(item_rows * layout.values);
  const std::unique_ptr<Softmax[]> states(new Softmax[item_rows]);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker<kInterleaved, T> worker(a, layout);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < queries; ++i) {
      const Part& s = parts[part_of_query[i]];
      worker.turn_query(s, i % a.queries - s.first_query, q.at(s.first_row * layout.padded));
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Item& item = items[i];
      const Part& s = parts[item.part];
      worker.attend(s, item, q.at(s.first_row * layout.padded),
                    sums.at(item.first_row * layout.values), states.get() + item.first_row);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < queries * a.heads; ++i) {
      const Part& s = parts[part_of_query[i / a.heads]];
      const int64_t first_row = s.items == 0 ? 0 : items[s.first_item].first_row;
      worker.combine(s, i - s.first_row, sums.at(first_row * layout.values),
                     states.get() + first_row);
    }
  }
}

template <typename T>
void decode_of(const DecodeCall& a, int threads) {
  a.tables.interleaved ? decode_of<true, T>(a, threads) : decode_of<false, T>(a, threads);
}

inline void decode_of_type(const DecodeCall& a, int threads) {
  switch (a.type) {
    case ElementType::kFloat32:
      return decode_of<float>(a, threads);
    case ElementType::kBFloat16:
      return decode_of<BFloat16>(a, threads);
    case ElementType::kFloat16:
      return decode_of<Float16>(a, threads);
  }
}

}  // namespace longrope
}  // namespace
