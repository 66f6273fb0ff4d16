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

// Whether AMD made this processor, whatever it runs.
bool is_amd();

}  // namespace longrope_cpu
