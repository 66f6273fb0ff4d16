// The instruction sets this build holds and this processor runs, and the entries of each.
#pragma once

#include "decode.h"
#include "rotary.h"

namespace longrope_cpu {

struct InstructionSet {
  const char* name;
  RotaryFunction rotary;
  DecodeFunction decode;
};

// Best first; there is always one, "baseline".
const InstructionSet* instruction_sets(int* count);

}  // namespace longrope_cpu
