// Scratch memory of a call, the same from call to call: to allocate it anew costs a short step a
// fifth of its time. Compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace {
namespace longrope {

constexpr std::align_val_t kScratchAlignment{64};

// What a thread keeps for its next call. It is given back in the order in which it was taken, last
// first, as members and variables are.
class Kept {
 public:
  ~Kept() { ::operator delete(memory_, kScratchAlignment); }

  // Null where there is no room.
  void* take(int64_t bytes) {
    if (bytes > kBytes - used_) return nullptr;
    if (memory_ == nullptr) {
      memory_ = static_cast<char*>(::operator new(kBytes, kScratchAlignment));
    }
    void* const taken = memory_ + used_;
    used_ += bytes;
    return taken;
  }
  void give_back(int64_t bytes) { used_ -= bytes; }

 private:
  static constexpr int64_t kBytes = 128 << 10;  // of a step: all but the sums of many splits
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

thread_local Kept kept;

// Numbers whose rows of whole vectors never straddle two cache lines; not initialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : count_(count),
        bytes_((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64),
        kept_(kept.take(bytes_)),
        data_(static_cast<T*>(kept_ != nullptr
                                  ? kept_
                                  : ::operator new(static_cast<size_t>(bytes_), kScratchAlignment))) {
  }
  ~Scratch() {
    if (kept_ != nullptr) {
      kept.give_back(bytes_);
    } else {
      ::operator delete(data_, kScratchAlignment);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* at(int64_t i) { return data_ + i; }
  void fill(T value) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = value;
  }

 private:
  const int64_t count_;
  const int64_t bytes_;
  void* const kept_;
  T* const data_;
};

using Floats = Scratch<float>;

}  // namespace longrope
}  // namespace
