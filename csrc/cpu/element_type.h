// What the elements of a tensor are; the numbers are those of longrope_kernels/backends.
#pragma once

namespace longrope_cpu {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

}  // namespace longrope_cpu
