// Writing new keys and values into a cache on the CPU: its entry.
#pragma once

#include "../records.h"

namespace longrope_cpu {

// Tokens are shared out between threads.
void append(const longrope_calls::AppendCall& call, int threads);

}  // namespace longrope_cpu
