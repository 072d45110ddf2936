#include "emulation.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#ifdef HESSKERN_EMULATE_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#endif

namespace hesskern::cuda::emulation {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA on CPU: %s\n", what);
  std::abort();
}

namespace {

constexpr size_t kLargestExchange = 64;
constexpr unsigned kMostThreads = 1024;
// What a block gets without asking, and at most (sm_90).
constexpr size_t kDefaultShared = 48 << 10;

struct Warp;

struct Copy {
  void* shared;
  const void* global;
  int bytes, size;
};

struct WarpgroupProduct {
  float* sums;
  std::function<void(float*)> run;
};

struct Thread {
  uint3 index;
  int lane;
  Warp* warp;
  // The last group is open.
  std::deque<std::vector<Copy>> copies;
  std::deque<std::vector<WarpgroupProduct>> products;
  // Of sums that products under way add to: what they will be, and how many products are left.
  struct Sums {
    std::vector<float> values;
    int left;
  };
  std::map<float*, Sums> sums;
  bool fenced = false;
#ifndef HESSKERN_EMULATE_THREADS
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  bool done = false;
#endif
};

#ifdef HESSKERN_EMULATE_THREADS

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned long generation = generation_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }
  // A thread that has returned takes part in no later barrier.
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --count_;
    if (count_ > 0 && arrived_ == count_) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned count_, arrived_ = 0;
  unsigned long generation_ = 0;
};

#else

void yield();

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait();
  void leave();

 private:
  void release();
  unsigned count_, arrived_ = 0;
  unsigned long generation_ = 0;
};

#endif

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  Barrier barrier;
  alignas(16) unsigned char slots[32 * kLargestExchange];
};

struct Block {
  uint3 index;
  dim3 size, grid;
  std::unique_ptr<unsigned char[]> shared;
  std::unique_ptr<Barrier> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Thread> threads;
};

Block* block = nullptr;
thread_local Thread* current = nullptr;

uint3 index_in(unsigned linear, dim3 size) {
  return {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
}

void prepare(Block& b, const cudaLaunchConfig_t& config, unsigned linear) {
  b.index = index_in(linear, config.gridDim);
  b.size = config.blockDim;
  b.grid = config.gridDim;
  const unsigned count = b.size.x * b.size.y * b.size.z;
  b.shared.reset(new unsigned char[config.dynamicSmemBytes]);
  std::memset(b.shared.get(), 0xff, config.dynamicSmemBytes);
  b.barrier = std::make_unique<Barrier>(count);
  b.warps.clear();
  for (unsigned first = 0; first < count; first += 32) {
    b.warps.push_back(std::make_unique<Warp>(count - first < 32 ? count - first : 32));
  }
  if (b.threads.size() != count) b.threads = std::vector<Thread>(count);
  for (unsigned i = 0; i < count; ++i) {
    b.threads[i].index = index_in(i, b.size);
    b.threads[i].lane = static_cast<int>(i % 32);
    b.threads[i].warp = b.warps[i / 32].get();
    b.threads[i].copies.assign(1, {});
    b.threads[i].products.assign(1, {});
    b.threads[i].sums.clear();
    b.threads[i].fenced = false;
  }
}

// A device would go on to write to memory that is another block's by then.
void check_copies_ended() {
  for (const std::vector<Copy>& group : current->copies) {
    if (!group.empty()) fail("a thread ends with copies under way");
  }
  if (!current->sums.empty()) fail("a thread ends with products under way");
}

#ifdef HESSKERN_EMULATE_THREADS

// Threads that run one block after another: to start some for every block would take most of the
// time.
class Crew {
 public:
  Crew(Block& b, const std::function<void()>& body, unsigned long long blocks)
      : round_(static_cast<unsigned>(b.threads.size()) + 1) {
    for (Thread& thread : b.threads) {
      running_.emplace_back([this, &b, &thread, &body, blocks] {
        current = &thread;
        for (unsigned long long i = 0; i < blocks; ++i) {
          round_.wait();
          body();
          check_copies_ended();
          thread.warp->barrier.leave();
          b.barrier->leave();
          round_.wait();
        }
      });
    }
  }
  ~Crew() {
    for (std::thread& thread : running_) thread.join();
  }
  // The block that is prepared.
  void run() {
    round_.wait();
    round_.wait();
  }

 private:
  Barrier round_;
  std::vector<std::thread> running_;
};

#else

constexpr size_t kStack = 256 << 10;

ucontext_t scheduler;
const std::function<void()>* body_of_block = nullptr;
// Barriers that opened and threads that returned: without any in a whole round nothing moves.
unsigned long progress = 0;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void* scheduler_fake_stack = nullptr;
#endif

// AddressSanitizer's own swapcontext clears what it knows of the whole stack at every switch, which
// takes half of the time of all checks; it is told of the switches here, and a stack is cleared
// before a thread starts.
void swap(ucontext_t& from, const ucontext_t& to) {
#if defined(__SANITIZE_ADDRESS__) && defined(__GLIBC__)
  using Swap = int (*)(ucontext_t*, const ucontext_t*);
  static const auto plain =
      reinterpret_cast<Swap>(dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "swapcontext"));
  plain(&from, &to);
#else
  swapcontext(&from, &to);
#endif
}

void switch_to_scheduler([[maybe_unused]] bool last) {
  Thread* self = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &self->fake_stack, scheduler_stack,
                                 scheduler_stack_size);
#endif
  swap(self->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void yield() {
  switch_to_scheduler(false);
}

void fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body_of_block)();
  check_copies_ended();
  current->done = true;
  ++progress;
  current->warp->barrier.leave();
  block->barrier->leave();
  switch_to_scheduler(true);
  fail("a thread went on after its end");
}

void resume(Thread& thread) {
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack.get(), kStack);
#endif
  swap(scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void run_block(Block& b, const std::function<void()>& body) {
  body_of_block = &body;
  for (Thread& thread : b.threads) {
    if (!thread.stack) thread.stack.reset(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(thread.stack.get(), kStack);
#endif
    thread.done = false;
    thread.fake_stack = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    const unsigned long before = progress;
    for (Thread& thread : b.threads) {
      if (thread.done) continue;
      resume(thread);
      running = running || !thread.done;
    }
    if (running && progress == before) fail("threads wait at different barriers");
  }
}

void Barrier::release() {
  arrived_ = 0;
  ++generation_;
  ++progress;
}

void Barrier::wait() {
  const unsigned long generation = generation_;
  if (++arrived_ == count_) release();
  while (generation_ == generation) yield();
}

void Barrier::leave() {
  --count_;
  if (count_ > 0 && arrived_ == count_) release();
}

#endif

}  // namespace

uint3 thread_index() {
  return current->index;
}
uint3 block_index() {
  return block->index;
}
dim3 block_size() {
  return block->size;
}
dim3 grid_size() {
  return block->grid;
}
int lane() {
  return current->lane;
}
unsigned char* dynamic_shared() {
  return block->shared.get();
}
void block_barrier() {
  block->barrier->wait();
}
void warp_barrier() {
  current->warp->barrier.wait();
}

const void* warp_exchange(const void* value, size_t size) {
  if (size > kLargestExchange) fail("a lane exchanges too much");
  std::memcpy(current->warp->slots + static_cast<size_t>(current->lane) * size, value, size);
  warp_barrier();
  return current->warp->slots;
}

void start_copy(void* shared, const void* global, int bytes, int size) {
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (places % static_cast<uintptr_t>(size) != 0 || bytes < 0 || bytes > size) {
    fail("a copy to shared memory is not aligned, or larger than what it fills");
  }
  current->copies.back().push_back({shared, global, bytes, size});
}

void close_copies() {
  current->copies.emplace_back();
}

void wait_for_copies(int latest_groups_left) {
  std::deque<std::vector<Copy>>& groups = current->copies;
  while (groups.size() > static_cast<size_t>(latest_groups_left) + 1) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.shared, 0, static_cast<size_t>(copy.size));
      std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    }
    groups.pop_front();
  }
}

void issue_product(float* sums, int count, std::function<void(float*)> product) {
  if (!current->fenced) fail("a product without a fence since the last wait");
  Thread::Sums& known = current->sums[sums];
  if (known.left == 0) known.values.assign(sums, sums + count);
  ++known.left;
  std::memset(sums, 0xff, static_cast<size_t>(count) * sizeof(float));
  current->products.back().push_back({sums, std::move(product)});
}

void fence_products() {
  current->fenced = true;
}

void close_products() {
  current->products.emplace_back();
  warp_barrier();
}

void wait_for_products(int latest_groups_left) {
  auto& groups = current->products;
  while (groups.size() > static_cast<size_t>(latest_groups_left) + 1) {
    for (const WarpgroupProduct& product : groups.front()) {
      Thread::Sums& known = current->sums[product.sums];
      product.run(known.values.data());
      if (--known.left > 0) continue;
      std::memcpy(product.sums, known.values.data(), known.values.size() * sizeof(float));
      current->sums.erase(product.sums);
    }
    groups.pop_front();
  }
  current->fenced = false;
  // The lanes go on together.
  warp_barrier();
}

size_t& shared_limit(const void* kernel) {
  static std::map<std::pair<int, const void*>, size_t> limits;
  return limits.emplace(std::pair(device_ordinal(), kernel), kDefaultShared).first->second;
}

std::set<const void*>& launched() {
  static std::set<const void*> kernels;
  return kernels;
}

Properties& device() {
  static Properties properties;
  return properties;
}

int device_ordinal() {
  static std::map<Properties, int> ordinals;
  return ordinals.emplace(device(), static_cast<int>(ordinals.size())).first->second;
}

namespace {

struct BulkCopy {
  std::vector<Piece> pieces;
  int bytes;
};

struct BarrierState {
  int arrivals = 0, pending = 0, bytes = 0;
  unsigned phase = 0;
  std::vector<BulkCopy> copies;
};

// By address; of the block that runs.
std::map<void*, BarrierState> barrier_states;

#ifdef HESSKERN_EMULATE_THREADS
std::mutex barrier_mutex;
std::condition_variable barrier_changed;
using BarrierGuard = std::unique_lock<std::mutex>;
BarrierGuard guard_barriers() {
  return BarrierGuard(barrier_mutex);
}
#else
struct BarrierGuard {
  ~BarrierGuard() {}
};
BarrierGuard guard_barriers() {
  return {};
}
#endif

BarrierState& state_of(void* barrier) {
  const auto found = barrier_states.find(barrier);
  if (found == barrier_states.end()) fail("a barrier in shared memory was not initialized");
  return found->second;
}

void end_phase_if_complete(BarrierState& state) {
  if (state.pending > 0 || state.bytes != 0) return;
  state.pending = state.arrivals;
  ++state.phase;
#ifdef HESSKERN_EMULATE_THREADS
  barrier_changed.notify_all();
#else
  ++progress;
#endif
}

bool look(BarrierState& state, unsigned parity) {
  for (const BulkCopy& copy : state.copies) {
    for (const Piece& piece : copy.pieces) {
      std::memset(piece.shared, 0, static_cast<size_t>(piece.size));
      if (piece.bytes > 0) {
        std::memcpy(piece.shared, piece.global, static_cast<size_t>(piece.bytes));
      }
    }
    state.bytes -= copy.bytes;
  }
  if (!state.copies.empty()) {
    state.copies.clear();
    end_phase_if_complete(state);
  }
  return state.phase % 2 != parity;
}

}  // namespace

void barrier_init(void* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("a barrier is not aligned");
  [[maybe_unused]] const BarrierGuard guard = guard_barriers();
  barrier_states[barrier] = {arrivals, arrivals, 0, 0, {}};
}

void barrier_arrive(void* barrier, int bytes) {
  [[maybe_unused]] const BarrierGuard guard = guard_barriers();
  BarrierState& state = state_of(barrier);
  if (state.pending == 0) fail("more threads arrive at a barrier than it counts");
  state.bytes += bytes;
  --state.pending;
  end_phase_if_complete(state);
}

bool barrier_passed(void* barrier, unsigned parity) {
  [[maybe_unused]] const BarrierGuard guard = guard_barriers();
  return look(state_of(barrier), parity);
}

void barrier_wait(void* barrier, unsigned parity) {
#ifdef HESSKERN_EMULATE_THREADS
  BarrierGuard guard = guard_barriers();
  while (!look(state_of(barrier), parity)) barrier_changed.wait(guard);
#else
  while (!barrier_passed(barrier, parity)) yield();
#endif
}

void start_bulk_copy(std::vector<Piece> pieces, int bytes, void* barrier) {
  [[maybe_unused]] const BarrierGuard guard = guard_barriers();
  for (const Piece& piece : pieces) {
    std::memset(piece.shared, 0xff, static_cast<size_t>(piece.size));
  }
  state_of(barrier).copies.push_back({std::move(pieces), bytes});
#ifdef HESSKERN_EMULATE_THREADS
  // Whoever waits does the copying.
  barrier_changed.notify_all();
#endif
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned long long threads =
      1ull * config.blockDim.x * config.blockDim.y * config.blockDim.z;
  const unsigned long long blocks = 1ull * config.gridDim.x * config.gridDim.y * config.gridDim.z;
  if (threads == 0 || threads > kMostThreads || blocks == 0 || config.gridDim.y > 65535 ||
      config.gridDim.z > 65535 || config.gridDim.x > 0x7fffffffu ||
      config.dynamicSmemBytes > static_cast<size_t>(device().most_shared)) {
    return cudaErrorInvalidConfiguration;
  }
  static Block storage;
  block = &storage;
#ifdef HESSKERN_EMULATE_THREADS
  prepare(storage, config, 0);
  Crew crew(storage, body, blocks);
#endif
  for (unsigned long long i = 0; i < blocks; ++i) {
    prepare(storage, config, static_cast<unsigned>(i));
    barrier_states.clear();
#ifdef HESSKERN_EMULATE_THREADS
    crew.run();
#else
    run_block(storage, body);
#endif
    for (const auto& [barrier, state] : barrier_states) {
      if (!state.copies.empty()) fail("a block ends with bulk copies under way");
    }
  }
  current = nullptr;
  block = nullptr;
  return cudaSuccess;
}

}  // namespace hesskern::cuda::emulation
