// A CUDA block on the CPU: every thread a fiber, all on one OS thread, the blocks one by one.
//
// A warp runs until each of its lanes waits, then another one, in an order that `order_seed` draws.
// Shared memory begins as NaN. What would hang, read or write where it must not on a GPU is a
// std::runtime_error: a barrier that some threads never reach, lanes of a warp that meet in
// different instructions, shared memory written past its end, copies left in flight.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1)
      : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace longrope_emulator {

constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 227 << 10;  // of a block on compute capability 9.0
constexpr size_t kCanary = 4096;            // bytes on either side of shared memory

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(what);
}

// 16 bytes on their way from global to shared memory; only the first `bytes` are read, 0 follows.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  Context context;
  std::unique_ptr<Stack> stack;
  uint3 index;
  State state = State::kDone;
  // Of the instruction in which it waits for other lanes:
  const char* meeting = nullptr;
  unsigned mask = 0;
  void* operands = nullptr;
  // cp.async:
  std::vector<Copy> open;                // not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  // Draws the order in which warps run: what is right in all of them has its barriers.
  unsigned order_seed = 0;

  void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
              const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t count = static_cast<size_t>(block.x) * block.y * block.z;
    if (count == 0 || count > 1024) fail("a block of " + std::to_string(count) + " threads");
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
        grid.z > 65535) {
      fail("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z));
    }
    if (shared_bytes > kSharedLimit) {
      fail(std::to_string(shared_bytes) + " bytes of shared memory");
    }
    while (pool_.size() < count) pool_.push_back(std::make_unique<Thread>());
    body_ = &body;
    count_ = count;
    shared_bytes_ = shared_bytes;
    random_.seed(order_seed);
    blockDim = block;
    gridDim = grid;
    try {
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) run_block({x, y, z});
    } catch (const std::exception& error) {
      for (auto& thread : pool_) thread->stack.reset();  // what they hold is of no use any more
      throw std::runtime_error(std::string(name) + ", block (" + std::to_string(blockIdx.x) +
                               ", " + std::to_string(blockIdx.y) + ", " +
                               std::to_string(blockIdx.z) + "): " + error.what());
    }
  }

  unsigned char* shared() { return shared_ + kCanary; }
  size_t shared_bytes() const { return shared_bytes_; }
  Thread& running() { return *running_; }
  size_t running_index() const { return running_index_; }
  int lane() const { return static_cast<int>(running_index_ % kWarp); }
  Thread& of_warp(int lane) { return *pool_[running_index_ / kWarp * kWarp + lane]; }
  // The lanes that the running thread's warp has.
  unsigned warp_lanes() const {
    const size_t begin = running_index_ / kWarp * kWarp;
    const size_t lanes = std::min<size_t>(kWarp, count_ - begin);
    return lanes == kWarp ? ~0u : (1u << lanes) - 1u;
  }

  template <typename Operands>
  Operands& operands_of(int lane) {
    return *static_cast<Operands*>(of_warp(lane).operands);
  }

  void barrier() {
    running_->state = State::kAtBarrier;
    suspend();
  }

  // The lanes of `mask` meet in one instruction: `operands` are those of the calling lane, and
  // execute() of the last to come reads and writes those of all, by `operands_of`.
  template <typename Execute>
  void meet(const char* name, unsigned mask, void* operands, const Execute& execute) {
    const unsigned me = 1u << lane();
    if ((mask & me) == 0) fail(std::string(name) + ": a lane calls it that its mask leaves out");
    if ((mask & ~warp_lanes()) != 0) fail(std::string(name) + ": its mask names lanes not there");
    running_->meeting = name;
    running_->mask = mask;
    running_->operands = operands;
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) == 0 || i == lane()) continue;
      const Thread& other = of_warp(i);
      if (other.state != State::kInWarp) {
        running_->state = State::kInWarp;
        return suspend();
      }
      if (std::strcmp(other.meeting, name) != 0 || other.mask != mask) {
        fail(std::string("lanes of a warp meet in ") + name + " and in " + other.meeting);
      }
    }
    execute();
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) != 0) of_warp(i).state = State::kReady;
    }
  }

 private:
  Machine() : shared_(static_cast<unsigned char*>(::operator new(kMemory, kAlign))) {}
  ~Machine() { ::operator delete(shared_, kAlign); }

  static constexpr size_t kMemory = kSharedLimit + 2 * kCanary;
  static constexpr std::align_val_t kAlign{4096};

  static void entry() {
    Machine& machine = instance();
    for (;;) {
      try {
        (*machine.body_)();
        if (!machine.running_->open.empty() || !machine.running_->groups.empty()) {
          fail("a thread ends with copies in flight");
        }
      } catch (...) {
        machine.error_ = std::current_exception();
      }
      machine.running_->state = State::kDone;
      machine.suspend();
    }
  }

  void suspend() { switch_context(&running_->context, &scheduler_); }

  void resume(size_t index) {
    running_ = pool_[index].get();
    running_index_ = index;
    threadIdx = running_->index;
    switch_context(&scheduler_, &running_->context);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void run_block(uint3 index) {
    blockIdx = index;
    std::memset(shared_, 0xff, kMemory);
    for (size_t i = 0; i < count_; ++i) {
      Thread& thread = *pool_[i];
      if (thread.stack == nullptr) {
        thread.stack = std::make_unique<Stack>();
        make_context(&thread.context, thread.stack->memory(), &Machine::entry);
        thread.open.clear();
        thread.groups.clear();
      }
      const unsigned n = static_cast<unsigned>(i);
      thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y,
                      n / blockDim.x / blockDim.y};
      thread.state = State::kReady;
    }
    std::vector<size_t> warps((count_ + kWarp - 1) / kWarp);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
    for (bool alive = true; alive;) {
      if (order_seed != 0) std::shuffle(warps.begin(), warps.end(), random_);
      for (const size_t warp : warps) run_warp(warp);
      alive = cross_barrier();
    }
    for (size_t i = 0; i < kCanary; ++i) {
      if (shared_[i] != 0xff || shared()[shared_bytes_ + i] != 0xff) {
        fail("shared memory written outside its " + std::to_string(shared_bytes_) + " bytes");
      }
    }
  }

  void run_warp(size_t warp) {
    const size_t begin = warp * kWarp, end = std::min(begin + kWarp, count_);
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t i = begin; i < end; ++i) {
        if (pool_[i]->state != State::kReady) continue;
        resume(i);
        moved = true;
      }
    }
  }

  // No thread is ready. Whether there is more to run.
  bool cross_barrier() {
    size_t waiting = 0, done = 0;
    const Thread* in_warp = nullptr;
    for (size_t i = 0; i < count_; ++i) {
      const Thread& thread = *pool_[i];
      waiting += thread.state == State::kAtBarrier;
      done += thread.state == State::kDone;
      if (thread.state == State::kInWarp) in_warp = &thread;
    }
    if (done == count_) return false;
    if (in_warp != nullptr) {
      fail(std::string(in_warp->meeting) + ": thread " + std::to_string(in_warp->index.x) +
           " waits for lanes that never come");
    }
    if (waiting != count_) {
      fail("__syncthreads: " + std::to_string(waiting) + " of " + std::to_string(count_) +
           " threads wait, the others have ended");
    }
    for (size_t i = 0; i < count_; ++i) pool_[i]->state = State::kReady;
    return true;
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Thread>> pool_;
  const std::function<void()>* body_ = nullptr;
  size_t count_ = 0;
  unsigned char* shared_;
  size_t shared_bytes_ = 0;
  Context scheduler_;
  Thread* running_ = nullptr;
  size_t running_index_ = 0;
  std::exception_ptr error_;
  std::mt19937 random_;
};

// Runs body() once for each thread of each block, with so much dynamic shared memory.
inline void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body) {
  Machine::instance().launch(name, grid, block, shared_bytes, body);
}

}  // namespace longrope_emulator
