// cp.async, ldmatrix and mma.sync m16n8k16 as the PTX ISA describes them, of the names and
// signatures of csrc/cuda/ptx.h.
//
// A copy happens as late as it may, when its thread waits for its group, and its destination is NaN
// from its issue on: a wait or a barrier that is missing, or a stage overwritten too early, shows.
#pragma once

#include "cuda.h"

namespace longrope_emulator {

// The n bytes at p, which must be aligned to n and within the dynamic shared memory.
inline unsigned char* shared_at(const char* name, const void* p, size_t n) {
  Machine& machine = Machine::instance();
  const auto* begin = machine.shared();
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < begin || at + n > begin + machine.shared_bytes()) {
    fail(std::string(name) + ": not within the " + std::to_string(machine.shared_bytes()) +
         " bytes of shared memory");
  }
  if (reinterpret_cast<uintptr_t>(at) % n != 0) {
    fail(std::string(name) + ": an address not aligned to " + std::to_string(n) + " bytes");
  }
  return const_cast<unsigned char*>(at);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  unsigned char* to = shared_at("cp.async", shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("cp.async: a global address not aligned to 16 bytes");
  }
  std::memset(to, 0xff, 16);
  Machine::instance().running().open.push_back({to, global, valid ? 16 : 0});
}

inline void cp_async_commit() {
  Thread& thread = Machine::instance().running();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

// Waits for all groups of this thread but the last `pending`.
inline void cp_async_wait(int pending) {
  Thread& thread = Machine::instance().running();
  while (static_cast<int>(thread.groups.size()) > pending) {
    for (const Copy& copy : thread.groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    thread.groups.pop_front();
  }
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i.
// Register i of lane l holds elements 2 (l % 4) and the next of row l / 4 (trans: of column l / 4).
inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row, bool trans) {
  struct Operands {
    const void* row;
    uint32_t* registers;
  };
  const char* name = trans ? "ldmatrix.trans" : "ldmatrix";
  Machine& machine = Machine::instance();
  Operands mine{row, registers};
  machine.meet(name, ~0u, &mine, [&] {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) {
        std::memcpy(matrix[r], shared_at(name, machine.operands_of<Operands>(8 * i + r).row, 16),
                    16);
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        const uint32_t low = trans ? matrix[t][g] : matrix[g][t];
        const uint32_t high = trans ? matrix[t + 1][g] : matrix[g][t + 1];
        machine.operands_of<Operands>(lane).registers[i] = low | high << 16;
      }
    }
  });
}

// d += a b of a warp, a 16 x 16, b 16 x 8, d 16 x 8 float32. With g = lane / 4 and t = 2 (lane % 4),
// and two elements to a register of a and b:
//   a: (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)   b: (t, g), (t + 8, g), down its columns
//   d: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)
// `widen` makes a float32 of the 16 bits of an element.
template <typename Widen>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const Widen& widen) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  };
  Machine& machine = Machine::instance();
  Operands mine{d, a, {b0, b1}};
  machine.meet("mma.sync", ~0u, &mine, [&] {
    float rows[16][16], columns[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& of = machine.operands_of<Operands>(lane);
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 2; ++i) {  // of the two elements of a register
        for (int r = 0; r < 4; ++r) {
          rows[g + r % 2 * 8][t + r / 2 * 8 + i] =
              widen(static_cast<uint16_t>(of.a[r] >> (16 * i)));
        }
        for (int r = 0; r < 2; ++r) {
          columns[t + r * 8 + i][g] = widen(static_cast<uint16_t>(of.b[r] >> (16 * i)));
        }
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      float* out = machine.operands_of<Operands>(lane).d;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; ++k) out[i] += rows[row][k] * columns[k][column];
      }
    }
  });
}

}  // namespace longrope_emulator
