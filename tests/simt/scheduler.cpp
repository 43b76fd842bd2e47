// Runs a launch: every CUDA thread is a fiber that gives way where it waits for others.

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>
#include <string>
#include <sys/mman.h>

#include "state.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace simt {

Thread* current = nullptr;
const Launch* launch = nullptr;
Barrier whole_grid;
uint32_t last_stamp = 0;
unsigned progress = 0;  // counts what may end another thread's polling

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kPatience = 2000;  // rounds in which threads only poll

jmp_buf scheduler_at;
std::vector<Thread*> woken;
std::vector<size_t> static_offsets;
size_t static_bytes = 0;
char* stacks = nullptr;
size_t stacks_bytes = 0;
std::string message;
bool failed = false;

// A fiber's life: the kernel once per block, then sleep until the next block starts.
void live() {
  for (;;) {
    launch->kernel(launch->arguments);
    settle();
    current->state = Thread::State::done;
    ++progress;
    if (_setjmp(current->resume_at) == 0) _longjmp(scheduler_at, 1);
  }
}

__attribute__((noinline)) void resume(Thread* thread) {
  current = thread;
  if (_setjmp(scheduler_at)) return;
  if (thread->started) _longjmp(thread->resume_at, 1);
  thread->started = true;
  setcontext(&thread->start);
}

void prepare(std::vector<Block>& blocks, size_t count) {
  const unsigned size = launch->block[0] * launch->block[1] * launch->block[2];
  stacks_bytes = count * size * kStack;
  stacks = static_cast<char*>(mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  blocks.resize(count);
  char* stack = stacks;
  for (Block& block : blocks) {
    block.threads.resize(size);
    block.warps.resize((size + kWarp - 1) / kWarp);
    block.shared = make_shared_memory();
    for (unsigned id = 0; id < size; ++id, stack += kStack) {
      Thread& thread = block.threads[id];
      thread.id = id;
      thread.block = &block;
      thread.index = {id % launch->block[0], id / launch->block[0] % launch->block[1],
                      id / launch->block[0] / launch->block[1]};
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = stack;
      thread.start.uc_stack.ss_size = kStack;
      makecontext(&thread.start, live, 0);
    }
  }
}

void start(Block& block, unsigned number) {
  const unsigned *grid = launch->grid, warps = block.warps.size();
  block.number = number;
  block.index = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
  block.born = block.floor = ++last_stamp;
  block.whole.expected = block.threads.size();
  for (unsigned w = 0; w < warps; ++w) block.warps[w].meetings.clear();
  clear_shared_memory(block);
  for (Thread& thread : block.threads) {
    thread.state = Thread::State::ready;
    thread.stamp = block.floor;
    thread.copies.clear();
    thread.groups.clear();
  }
}

// "0-31, 64" of ascending ids.
std::string ranges(const std::vector<unsigned>& ids) {
  std::string text;
  for (size_t i = 0; i < ids.size();) {
    size_t j = i;
    while (j + 1 < ids.size() && ids[j + 1] == ids[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(ids[i]);
    if (j > i) text += "-" + std::to_string(ids[j]);
    i = j + 1;
  }
  return text;
}

void report_threads(const Block& block) {
  struct Place {
    std::string name;
    std::vector<unsigned> ids;
  };
  std::vector<Place> places;
  for (const Thread& thread : block.threads) {
    char name[160] = "have ended";
    if (thread.state != Thread::State::done)
      snprintf(name, sizeof(name), "wait at %s, @%p@", thread.waits_at, image_offset(thread.pc));
    auto place = std::find_if(places.begin(), places.end(),
                              [&](const Place& p) { return p.name == name; });
    if (place == places.end()) place = places.insert(places.end(), Place{name, {}});
    place->ids.push_back(thread.id);
  }
  message += "\n  block " + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) +
             ", " + std::to_string(block.index.z);
  for (const Place& place : places)
    message += "\n    threads " + ranges(place.ids) + " " + place.name;
}

void report_deadlock(const std::vector<Block>& blocks, const char* reason) {
  failed = true;
  message = reason;
  int shown = 0;
  for (const Block& block : blocks) {
    const bool stuck = std::any_of(block.threads.begin(), block.threads.end(), [](const Thread& t) {
      return t.state != Thread::State::done;
    });
    if (stuck && shown++ < 4) report_threads(block);
  }
}

uint32_t random_state;
uint32_t random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

template <typename T, typename Key>
void put_in_order(std::vector<T>& items, Key key) {
  std::sort(items.begin(), items.end(), [&](const T& a, const T& b) { return key(a) < key(b); });
  if (launch->schedule == reverse) std::reverse(items.begin(), items.end());
  if (launch->schedule == shuffled)
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

// Leaves the threads of the first block that can go on by itself; the others stay woken.
void keep_first_block(std::vector<Thread*>& ready) {
  auto able = std::find_if(ready.begin(), ready.end(), [](const Thread* t) { return !t->polls; });
  if (able == ready.end()) return;
  const Block* block = (*able)->block;
  auto rest = std::stable_partition(ready.begin(), ready.end(),
                                    [&](const Thread* t) { return t->block == block; });
  woken.insert(woken.end(), rest, ready.end());
  ready.erase(rest, ready.end());
}

// Runs the started blocks to their end.
void run(std::vector<Block>& blocks) {
  std::vector<Thread*> ready;
  for (Block& block : blocks)
    for (Thread& thread : block.threads) ready.push_back(&thread);
  for (unsigned idle = 0; !ready.empty(); ready.swap(woken)) {
    woken.clear();
    put_in_order(ready, [](const Thread* t) { return std::pair(t->block->number, t->id); });
    if (launch->schedule == blockwise) keep_first_block(ready);
    const unsigned before = progress;
    for (Thread* thread : ready) {
      thread->polls = false;
      resume(thread);
      if (failed) return;
    }
    idle = progress == before ? idle + 1 : 0;
    if (idle > kPatience) return report_deadlock(blocks, "threads poll for what nobody stores");
  }
  for (Block& block : blocks)
    for (Thread& thread : block.threads)
      if (thread.state != Thread::State::done)
        return report_deadlock(blocks, "divergent barrier: some threads wait for others forever");
}

void arrive(Barrier& barrier, const char* what, bool waits) {
  barrier.arrivals.push_back({current, current->stamp, waits});
  if (!waits) {  // what it does from here on is not ordered; they share the stamp
    if (barrier.behind <= current->stamp) barrier.behind = ++last_stamp;
    current->stamp = barrier.behind;
  }
  if (barrier.arrivals.size() < barrier.expected) {
    if (waits) wait(what);
    return;
  }
  ++progress;
  std::vector<Arrival> arrivals;
  arrivals.swap(barrier.arrivals);
  // Every thread of every block that takes part is here, or some threads of one block are.
  const bool whole_blocks = arrivals.size() >= current->block->threads.size();
  const bool all_wait = std::all_of(arrivals.begin(), arrivals.end(),
                                    [](const Arrival& arrival) { return arrival.waits; });
  if (whole_blocks && all_wait) {
    for (const Arrival& arrival : arrivals)
      if (arrival.thread->id == 0) order_block(*arrival.thread->block);
  } else {
    order_threads(arrivals);
  }
  for (const Arrival& arrival : arrivals)
    if (arrival.waits && arrival.thread != current) wake(arrival.thread);
  arrivals.clear();
  arrivals.swap(barrier.arrivals);  // keeps its memory
}

void use_named_barrier(int id, int threads, bool waits) {
  if (id == 0 && threads == 0) return arrive(current->block->whole, "__syncthreads", waits);
  if (id < 0 || id >= int(kNamedBarriers)) stop("there is no barrier %d, only 0 to 15", id);
  Barrier& barrier = current->block->named[id];
  const unsigned expected = threads ? threads : current->block->threads.size();
  if (expected % kWarp) stop("barrier %d waits for %u threads, not whole warps", id, expected);
  if (!barrier.arrivals.empty() && barrier.expected != expected)
    stop("barrier %d waits for %u threads and for %u at once", id, barrier.expected, expected);
  barrier.expected = expected;
  static const char* names[kNamedBarriers] = {
      "barrier 0",  "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
      "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
      "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  arrive(barrier, names[id], waits);
}

}  // namespace

void set_flush(bool flush) {
#if defined(__SSE__)
  constexpr unsigned kBits = 0x8040;  // of results and of operands
  _mm_setcsr((_mm_getcsr() & ~kBits) | (flush ? kBits : 0));
#elif defined(__aarch64__)
  constexpr uint64_t kBit = 1 << 24;
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" : : "r"((control & ~kBit) | (flush ? kBit : 0)));
#endif
}

void wait(const char* what) {
  current->waits_at = what;
  current->state = Thread::State::waiting;
  if (_setjmp(current->resume_at) == 0) _longjmp(scheduler_at, 1);
}

void wake(Thread* thread) {
  thread->state = Thread::State::ready;
  woken.push_back(thread);
}

bool on_own_stack(const void* address) {
  const char* stack = static_cast<const char*>(current->start.uc_stack.ss_sp);
  return address >= stack && address < stack + kStack;
}

const char* image_begin() {
  static const char* begin = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&image_begin), &info);
    return static_cast<const char*>(info.dli_fbase);
  }();
  return begin;
}

const void* image_offset(const void* pc) {
  return reinterpret_cast<const void*>(static_cast<const char*>(pc) - 1 - image_begin());
}

void stop(const char* format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  failed = true;
  message = text;
  char place[160];
  snprintf(place, sizeof(place), "\n  block %u, %u, %u, thread %u, @%p@", current->block->index.x,
           current->block->index.y, current->block->index.z, current->id,
           image_offset(current->pc));
  message += place;
  _longjmp(scheduler_at, 1);
}

dim3 thread_index() { return current->index; }
dim3 block_index() { return current->block->index; }
dim3 block_size() { return {launch->block[0], launch->block[1], launch->block[2]}; }
dim3 grid_size() { return {launch->grid[0], launch->grid[1], launch->grid[2]}; }
unsigned linear_thread() { return current->id; }

void* dynamic_shared() { return current->block->shared.begin; }

void* static_shared(unsigned declaration, size_t bytes) {
  if (static_offsets.size() <= declaration) static_offsets.resize(declaration + 1, ~size_t(0));
  if (static_offsets[declaration] == ~size_t(0)) {
    if (static_bytes + bytes > kStaticShared) stop("more than 48 KB of __shared__ arrays");
    static_offsets[declaration] = static_bytes;
    static_bytes += (bytes + 127) / 128 * 128;
  }
  const Region& shared = current->block->shared;
  return shared.begin + shared.bytes - kStaticShared + static_offsets[declaration];
}

// Every call from the kernel first notes where it comes from.
#define SIMT_ENTER                              \
  current->pc = __builtin_return_address(0);    \
  settle()

void block_barrier() {
  SIMT_ENTER;
  arrive(current->block->whole, "__syncthreads", true);
}

void named_barrier(int id, int threads) {
  SIMT_ENTER;
  use_named_barrier(id, threads, true);
}

void named_arrive(int id, int threads) {
  SIMT_ENTER;
  use_named_barrier(id, threads, false);
}

void grid_barrier() {
  SIMT_ENTER;
  if (!launch->cooperative) stop("a grid barrier needs a cooperative launch");
  arrive(whole_grid, "grid barrier", true);
}

void yield() {
  SIMT_ENTER;
  current->polls = true;
  woken.push_back(current);
  wait("a polled location");
}

void note_progress() { ++progress; }

void reject(const char* reason) {
  SIMT_ENTER;
  stop("%s", reason);
}

}  // namespace simt

// Runs one launch; returns nullptr, or what went wrong, with code addresses as @offset@.
extern "C" const char* simt_launch(const simt::Launch* request) {
  using namespace simt;
  launch = request;
  failed = false;
  message.clear();
  woken.clear();
  static_offsets.clear();
  static_bytes = 0;
  random_state = request->seed | 1;
  whole_grid.arrivals.clear();
  const size_t total = size_t(request->grid[0]) * request->grid[1] * request->grid[2];
  std::vector<unsigned> numbers(total);
  for (size_t i = 0; i < total; ++i) numbers[i] = i;
  put_in_order(numbers, [](unsigned number) { return number; });

  open_memory();
  set_flush(request->flush);
  std::vector<Block> blocks;
  prepare(blocks, request->cooperative ? total : 1);
  whole_grid.expected = blocks.size() * blocks[0].threads.size();
  for (size_t next = 0; next < total && !failed; next += blocks.size()) {
    for (size_t i = 0; i < blocks.size(); ++i) start(blocks[i], numbers[next + i]);
    run(blocks);
  }
  set_flush(false);
  for (Block& block : blocks) free_region(block.shared);
  munmap(stacks, stacks_bytes);
  current = nullptr;
  if (const char* damage = close_memory(); damage && !failed) {
    failed = true;
    message = damage;
  }
  return failed ? message.c_str() : nullptr;
}
