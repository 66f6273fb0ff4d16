// What decoding has to do: parts of queries, each with the keys that it sees, in splits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decode.h"
#include "decode_softmax.h"
#include "factor_set.h"

namespace {
namespace longrope {

using longrope_calls::DecodeCall;

constexpr int64_t kSplit = 256;       // keys, at least
constexpr int64_t kMaxSplits = 64;    // of a sequence; bounds the memory for what is to be combined
constexpr int64_t kFewQueries = 16;   // of a sequence, that go through the keys together
constexpr int64_t kPartQueries = 32;  // of a part, at most, where there are more

// Consecutive queries of one sequence under one factor set, and what they ask for, in slots;
// queries and keys stand at slot - start. Row h * queries + t is query t of head h: the rows of a
// KV head are consecutive.
struct Part {
  int64_t sequence;
  int64_t first_query;
  int64_t queries;
  int64_t first_slot;  // of its first query
  int64_t begin;       // the keys that any of its queries sees
  int64_t end;
  int64_t start;
  int64_t set;
  int64_t first_row;   // of all parts
  int64_t first_item;  // of its splits
  int64_t items;
};

struct Item {
  int64_t part;
  int64_t begin;
  int64_t end;
  int64_t first_row;  // of the rows of all items
};

inline int64_t position_at(const DecodeCall& a, int64_t sequence, int64_t slot,
                           int64_t start) {
  if (a.keys.positions.data == nullptr) return slot - start;
  if (slot < 0) return 0;  // of a query that sees nothing
  return element(a.keys.positions, sequence, slot);
}

inline int64_t start_of(const DecodeCall& a, int64_t sequence) {
  return a.keys.start.data == nullptr ? 0 : element(a.keys.start, sequence);
}

// The factor set of query t.
inline int64_t set_of_query(const DecodeCall& a, int64_t sequence, int64_t t) {
  const int64_t tokens =
      element(a.keys.lens, sequence) - a.queries + t + 1 - start_of(a, sequence);
  return set_of_query(a.tables, a.selection, sequence, t, tokens);
}

// Queries of a part at most.
inline int64_t most_queries(const DecodeCall& a) {
  return a.queries <= kFewQueries ? a.queries : kPartQueries;
}

// Appends the parts of a sequence: one, where its queries are few and in no need of two sets.
inline void add_parts(const DecodeCall& a, int64_t sequence, std::vector<Part>& parts) {
  const int64_t most = most_queries(a);
  for (int64_t t = 0; t < a.queries;) {
    Part s;
    s.sequence = sequence;
    s.first_query = t;
    s.set = set_of_query(a, sequence, t);
    while (++t < a.queries && t - s.first_query < most && set_of_query(a, sequence, t) == s.set) {}
    s.queries = t - s.first_query;
    s.start = start_of(a, sequence);
    s.end = element(a.keys.lens, sequence) - (a.queries - t);
    s.first_slot = s.end - s.queries;
    s.begin = a.scores.window > 0 ? std::max(s.start, s.first_slot - a.scores.window + 1) : s.start;
    s.begin = std::max<int64_t>(s.begin, 0);
    s.first_row = parts.empty() ? 0 : parts.back().first_row + parts.back().queries * a.heads;
    parts.push_back(s);
  }
}

// Appends the splits of a part: about equal, of whole tiles, at most as many as make kMaxSplits of
// as many parts. Returns how many rows all items have then.
inline int64_t add_items(Part& s, int64_t index, int64_t parts, int64_t heads, int64_t first_row,
                         std::vector<Item>& items) {
  s.first_item = static_cast<int64_t>(items.size());
  const int64_t keys = std::max<int64_t>(s.end - s.begin, 0);
  const int64_t most = std::max<int64_t>(kMaxSplits / parts, 1);
  const int64_t least = (keys + most - 1) / most;
  const int64_t split = std::max(kSplit, (least + kTile - 1) / kTile * kTile);
  for (int64_t begin = s.begin; begin < s.end; begin += split) {
    items.push_back({index, begin, std::min(begin + split, s.end), first_row});
    first_row += s.queries * heads;
  }
  s.items = static_cast<int64_t>(items.size()) - s.first_item;
  return first_row;
}

}  // namespace longrope
}  // namespace
