// Which factor set a sequence takes, for host and device alike.
#pragma once

#include "records.h"
#include "rotation.h"

namespace {
namespace longrope {

using longrope_calls::Integers;
using longrope_calls::Selection;
using longrope_calls::Tables;

LONGROPE_INLINE int64_t integer_at(const Integers& x, int64_t at) {
  return x.are_int64 ? static_cast<const int64_t*>(x.data)[at]
                     : static_cast<const int32_t*>(x.data)[at];
}

LONGROPE_INLINE int64_t element(const Integers& vector, int64_t i) {
  return integer_at(vector, i * vector.strides[0]);
}

LONGROPE_INLINE int64_t element(const Integers& matrix, int64_t i, int64_t j) {
  return integer_at(matrix, i * matrix.strides[0] + j * matrix.strides[1]);
}

LONGROPE_INLINE int64_t set_of_sequence(const Tables& tables, const Selection& selection,
                                        int64_t sequence) {
  if (selection.sets.data != nullptr) {
    const int64_t set = element(selection.sets, sequence);
    return set < 0 ? 0 : set < tables.sets ? set : tables.sets - 1;
  }
  if (selection.lengths.data == nullptr) return 0;
  return set_of_length(element(selection.lengths, sequence), tables.max_length, tables.sets);
}

// The set of a query, where a call has few; tokens: how many there are up to it.
LONGROPE_INLINE int64_t set_of_query(const Tables& tables, const Selection& selection,
                                     int64_t sequence, int64_t query, int64_t tokens) {
  if (selection.sets.data != nullptr) return set_of_sequence(tables, selection, sequence);
  const int64_t length = selection.lengths.data == nullptr
                             ? tokens
                             : element(selection.lengths, sequence, query);
  return set_of_length(length, tables.max_length, tables.sets);
}

// The set of a token in a batch row.
LONGROPE_INLINE int64_t set_of_token(const Tables& tables, const Selection& selection,
                                     int64_t batch, int64_t token) {
  if (selection.sets.data == nullptr && selection.lengths.data == nullptr) return 0;
  int64_t sequence = batch;
  if (selection.borders.data != nullptr) {
    // How many of borders[1:sequences] are not above it.
    int64_t last = selection.sequences - 1;
    sequence = 0;
    while (sequence < last) {
      const int64_t middle = (sequence + last) / 2;
      if (element(selection.borders, middle + 1) <= token) {
        sequence = middle + 1;
      } else {
        last = middle;
      }
    }
  }
  return set_of_sequence(tables, selection, sequence);
}

}  // namespace longrope
}  // namespace
