// The emulator's own state: threads as fibers, blocks with their barriers and shared memory.
//
// One launch runs at a time, on one CPU thread. A CUDA thread runs until it waits for others, so
// what it does in between is never interleaved with another's; that is what the schedules vary.
#pragma once

#include <cstdint>
#include <memory>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#include "runtime.h"

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kNamedBarriers = 16;
constexpr size_t kStaticShared = 48 * 1024;  // what CUDA allows for __shared__ arrays

struct Block;

struct AsyncCopy {
  char* to;
  const char* from;
  unsigned bytes;
  bool present;
};

struct Thread {
  enum class State { ready, waiting, done };

  unsigned id = 0;  // in its block, x fastest
  dim3 index;
  Block* block = nullptr;
  State state = State::ready;
  bool polls = false;
  const char* waits_at = "";  // what it waits for, and where the kernel asked for it
  const void* pc = nullptr;

  std::vector<AsyncCopy> copies;  // cp.async, oldest first
  std::vector<size_t> groups;     // their sizes by commit; the rest is not committed

  // What this thread did carries its stamp. `known[u]` is the newest stamp of thread u that is
  // ordered before this thread's next access; valid while the block's floor is `known_since`.
  uint32_t stamp = 0;
  uint32_t known_since = 0;
  std::vector<uint32_t> known;

  ucontext_t start;
  jmp_buf resume_at;
  bool started = false;
};

struct Arrival {
  Thread* thread;
  uint32_t stamp;
  bool waits;
};

struct Barrier {
  unsigned expected = 0;
  std::vector<Arrival> arrivals;
  uint32_t behind = 0;  // stamp of those that went on without waiting
};

// The lanes of one mask on their way to one instruction. Two sets of slots take turns: a lane can
// enter the next meeting while a slower one still reads this one.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* what = "";
  int turn = 0;
  std::vector<Thread*> waiting;
  alignas(16) unsigned char slots[2][kWarp][64];
};

struct Warp {
  std::vector<std::unique_ptr<Meeting>> meetings;
};

constexpr unsigned kReaders = 3;  // warps that specialise read between different barriers

// Warps, by bit, that read at one stamp; none: not in use.
struct Readers {
  uint32_t stamp, warps;
};

// What is remembered of two bytes of memory: who wrote and who read them last. A thread is named
// across the grid, as block number * 1024 + thread.
struct Cell {
  uint32_t write_stamp, writer, write_pc;
  uint32_t read_stamp, reader, read_pc;
  Readers readers[kReaders];  // where `reader` stands for several threads
  uint32_t in_flight;         // a cp.async is about to write here
};

// Memory that a kernel may touch, between two guard zones.
struct Region {
  char* begin = nullptr;
  size_t bytes = 0;
  const char* name = "";
  Cell* cells = nullptr;
  unsigned cell_shift = 1;  // log2 of the bytes of a cell
};

struct Block {
  dim3 index;
  unsigned number = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier whole, named[kNamedBarriers];
  Region shared;         // dynamic, then static
  uint32_t born = 0;     // stamp at which the block started
  uint32_t floor = 0;    // everything with a smaller stamp is ordered before everything to come
};

struct Tensor {
  const char* name;
  char* data;
  size_t bytes;
  unsigned item_bytes;
  unsigned argument;  // of the kernel
};

// Orders of threads and blocks. `blockwise` is for cooperative launches: a block runs until only
// another block can help it.
enum Schedule { forward = 0, reverse = 1, shuffled = 2, blockwise = 3 };

struct Launch {
  void (*kernel)(void**);
  void** arguments;
  unsigned grid[3], block[3];
  size_t dynamic_shared;
  int cooperative;   // all blocks at once
  int schedule;
  uint32_t seed;
  int flush;         // fp32 results and operands that are subnormal are zero (nvcc -ftz=true)
  int instrumented;  // the kernel's own loads and stores are reported (hooks.cpp)
  const Tensor* tensors;
  unsigned tensor_count;
};

extern Thread* current;
extern const Launch* launch;
extern Barrier whole_grid;
extern uint32_t last_stamp;
extern unsigned progress;

// scheduler.cpp
void set_flush(bool flush);
void wait(const char* what);  // gives way until somebody calls wake
void wake(Thread* thread);
[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool on_own_stack(const void* address);
const char* image_begin();
const void* image_offset(const void* pc);  // for messages: relative to the library, inside the call

// memory.cpp
void open_memory();
// Copies tensors back; says so if a guard zone was written to.
const char* close_memory();
Region make_shared_memory();
void free_region(Region& region);
void clear_shared_memory(Block& block);
enum class Access { read, write };
void access(const void* address, size_t bytes, Access kind, const void* pc);
void settle();  // the last store that may have been a race is done: was it?

// The order that a barrier makes among those who arrived.
void order_block(Block& block);
void order_threads(const std::vector<Arrival>& arrivals);

// While it lives, subnormal numbers count: what tensor cores and IEEE intrinsics do under -ftz=true.
class Subnormals {
 public:
  Subnormals() { set_flush(false); }
  ~Subnormals() { set_flush(launch->flush); }
};

}  // namespace simt
