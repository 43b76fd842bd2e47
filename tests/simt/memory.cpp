// Who touched which byte: bounds, unwritten shared memory, cp.async in flight, races.
//
// Two accesses race if they touch the same bytes from different threads, one of them writes, and no
// barrier orders them. Barriers order through stamps (order_block, order_threads). Shuffles and
// tensor-core instructions order nothing, as in CUDA. Several threads may store the same value to
// the same place: generated code does so where it keeps copies of a value. Blocks of one launch are
// never ordered, except by a grid barrier; between blocks of a cooperative launch nothing is
// checked, because flags in memory may order them.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>

#include "state.h"

// The end of this library's data, from the linker.
extern "C" char _end __attribute__((visibility("hidden")));

namespace simt {
namespace {

constexpr size_t kGuard = 16 * 1024;
constexpr unsigned kPerBlock = 1024;             // threads, in a thread's name across the grid
constexpr uint32_t kNobody = 0xffffffff;
constexpr uint32_t kSeveral = 0x80000000;        // readers: of block (reader & ~kSeveral)
constexpr uint32_t kSeveralBlocks = 0xfffffffe;

std::vector<Region> regions;

// A store over another thread's unordered store: a race unless the value stays the same.
struct Suspect {
  char* address = nullptr;
  size_t bytes;
  unsigned char before[32];
  Cell cell;
  const Region* region;
  const void* pc;
};
Suspect suspect;

char* map_memory(size_t bytes) {
  return static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// Guard zones hold NaN in bf16, fp16 and fp32, another one at each place and in each region: a copy
// from one guard zone to another must change it.
template <typename Function>
bool each_guard_word(const Region& region, Function function) {
  const char* end = region.begin + whole_pages(region.bytes) + kGuard;
  auto zone = [&](char* from, const char* to) {
    uint32_t salt = region.name[0] * 31u;
    for (; from < to; from += 2) {
      const uint16_t word = 0xff81 + (salt += 11) % 61;
      if (!function(from, reinterpret_cast<const char*>(&word), from + 2 <= to ? 2 : 1)) return false;
    }
    return true;
  };
  return zone(region.begin - kGuard, region.begin) && zone(region.begin + region.bytes, end);
}

bool guards_hold(const Region& region) {
  return each_guard_word(region, [](const char* at, const char* word, size_t bytes) {
    return memcmp(at, word, bytes) == 0;
  });
}

Region make_region(const char* name, size_t bytes, unsigned cell_shift) {
  Region region;
  region.name = name;
  region.bytes = bytes;
  region.begin = map_memory(whole_pages(bytes) + 2 * kGuard) + kGuard;
  region.cell_shift = cell_shift;
  region.cells = reinterpret_cast<Cell*>(map_memory(((bytes >> cell_shift) + 1) * sizeof(Cell)));
  each_guard_word(region, [](char* at, const char* word, size_t size) {
    memcpy(at, word, size);
    return true;
  });
  return region;
}

uint32_t own_name() { return current->block->number * kPerBlock + current->id; }

// Is what thread `other` did at `stamp` ordered before what the current thread does now?
bool ordered(uint32_t other, uint32_t stamp) {
  if (other == kNobody) return true;
  const Block& block = *current->block;
  if (other / kPerBlock != block.number) return launch->cooperative;
  const unsigned id = other % kPerBlock;
  if (stamp < block.floor || id == current->id) return true;
  return current->known_since == block.floor && current->known[id] >= stamp;
}

bool readers_ordered(const Cell& cell) {
  if (cell.reader == kSeveralBlocks) return launch->cooperative;
  if (cell.reader == kNobody || !(cell.reader & kSeveral)) return ordered(cell.reader, cell.read_stamp);
  const Block& block = *current->block;
  if ((cell.reader & ~kSeveral) != block.number) return launch->cooperative;
  if (cell.read_stamp < block.floor) return true;
  for (const Thread& thread : block.threads)
    for (const Readers& readers : cell.readers)
      if (readers.warps >> (thread.id / kWarp) & 1 && thread.id != current->id &&
          !ordered(block.number * kPerBlock + thread.id, readers.stamp))
        return false;
  return true;
}

// Where there are more stamps than places, all that are left count as the latest: a race may be
// reported that is none, but none is missed.
void add_reader(Cell& cell, unsigned warp, uint32_t stamp) {
  for (Readers& readers : cell.readers) {
    if (readers.warps && readers.stamp != stamp && &readers != cell.readers + kReaders - 1) continue;
    readers.stamp = readers.warps ? std::max(readers.stamp, stamp) : stamp;
    readers.warps |= 1u << warp;
    return;
  }
}

void forget_readers(Cell& cell) {
  for (Readers& readers : cell.readers) readers = {};
}

// "thread 5 of block 0" and the line where it was; for messages.
const char* who(uint32_t name, uint32_t pc) {
  static char texts[2][96];
  static int turn = 0;
  char* text = texts[turn ^= 1];
  if (name == kSeveralBlocks)
    snprintf(text, sizeof(texts[0]), "several blocks, last in @0x%x@", pc);
  else if (name & kSeveral)
    snprintf(text, sizeof(texts[0]), "several threads of block %u, last in @0x%x@",
             name & ~kSeveral, pc);
  else
    snprintf(text, sizeof(texts[0]), "thread %u of block %u in @0x%x@", name % kPerBlock,
             name / kPerBlock, pc);
  return text;
}

uint32_t place(const void* pc) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(image_offset(pc)));
}

const Region* find(const char* address) {
  const Region& shared = current->block->shared;
  if (address >= shared.begin - kGuard && address < shared.begin + shared.bytes + kGuard)
    return &shared;
  for (const Region& region : regions)
    if (address >= region.begin - kGuard && address < region.begin + region.bytes + kGuard)
      return &region;
  return nullptr;
}

bool own_data(const char* address) { return address >= image_begin() && address < &_end; }

// The region that these bytes lie in; nullptr for the thread's own variables.
const Region* locate(const char* address, size_t bytes, const char* verb) {
  const Region* region = find(address);
  if (!region) {
    if (on_own_stack(address) || own_data(address)) return nullptr;
    stop("%s %zu bytes outside of every tensor and of shared memory", verb, bytes);
  }
  const ptrdiff_t offset = address - region->begin;
  const bool shared = region == &current->block->shared;
  const bool gap = shared && offset < ptrdiff_t(region->bytes - kStaticShared) &&
                   offset + bytes > launch->dynamic_shared;
  if (offset < 0 || offset + bytes > region->bytes || gap)
    stop("%s %zu bytes out of bounds: at offset %td of %s, which has %zu bytes", verb, bytes,
         offset, region->name, shared ? launch->dynamic_shared : region->bytes);
  return region;
}

// Cells of shared memory forget what an earlier block left in them.
template <typename Function>
void each_cell(const Region& region, const char* address, size_t bytes, Function function) {
  const size_t first = size_t(address - region.begin) >> region.cell_shift;
  const size_t last = size_t(address - region.begin + bytes - 1) >> region.cell_shift;
  const Block& block = *current->block;
  const bool shared = &region == &block.shared;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region.cells[i];
    if (shared && cell.write_stamp < block.born) cell = {};
    function(cell);
  }
}

void note_read(const Region& region, Cell& cell, const char* address, uint32_t pc) {
  const Block& block = *current->block;
  const ptrdiff_t offset = address - region.begin;
  if (cell.in_flight)
    stop("reads offset %td of %s before the cp.async of %s has been waited for", offset,
         region.name, who(cell.writer, cell.write_pc));
  if (&region == &block.shared && cell.write_stamp == 0)
    stop("reads offset %td of shared memory, which nobody has written yet", offset);
  if (cell.write_stamp && !ordered(cell.writer, cell.write_stamp))
    stop("race: reads offset %td of %s, written by %s with no barrier in between", offset,
         region.name, who(cell.writer, cell.write_pc));
  const uint32_t self = own_name();
  if (cell.read_stamp == 0 || readers_ordered(cell)) {
    cell.reader = self;
    forget_readers(cell);
  } else if (cell.reader != self) {
    const bool several = cell.reader & kSeveral;
    const uint32_t number = several ? cell.reader & ~kSeveral : cell.reader / kPerBlock;
    if (cell.reader != kSeveralBlocks) {
      if (!several) add_reader(cell, cell.reader % kPerBlock / kWarp, cell.read_stamp);
      cell.reader = number == block.number ? kSeveral | number : kSeveralBlocks;
    }
    add_reader(cell, current->id / kWarp, current->stamp);
  }
  cell.read_stamp = current->stamp;
  cell.read_pc = pc;
}

void note_write(const Region& region, Cell& cell, const char* address, uint32_t pc) {
  const ptrdiff_t offset = address - region.begin;
  if (cell.in_flight)
    stop("writes offset %td of %s before the cp.async of %s has been waited for", offset,
         region.name, who(cell.writer, cell.write_pc));
  if (cell.read_stamp && !readers_ordered(cell))
    stop("race: writes offset %td of %s, read by %s with no barrier in between", offset,
         region.name, who(cell.reader, cell.read_pc));
  cell.write_stamp = current->stamp;
  cell.writer = own_name();
  cell.write_pc = pc;
  cell.read_stamp = 0;
  cell.reader = kNobody;
  forget_readers(cell);
}

}  // namespace

void settle() {
  if (!suspect.address) return;
  char* address = suspect.address;
  suspect.address = nullptr;
  if (memcmp(address, suspect.before, suspect.bytes) == 0) return;
  current->pc = suspect.pc;
  stop("race: writes offset %td of %s, over another value written by %s with no barrier in between",
       address - suspect.region->begin, suspect.region->name,
       who(suspect.cell.writer, suspect.cell.write_pc));
}

void access(const void* pointer, size_t bytes, Access kind, const void* pc) {
  settle();
  char* address = const_cast<char*>(static_cast<const char*>(pointer));
  current->pc = pc;
  const Region* region = locate(address, bytes, kind == Access::read ? "reads" : "writes");
  if (!region || !launch->instrumented) return;
  const uint32_t from = place(pc);
  if (kind == Access::read)
    return each_cell(*region, address, bytes,
                     [&](Cell& cell) { note_read(*region, cell, address, from); });
  each_cell(*region, address, bytes, [&](Cell& cell) {
    const bool conflict = cell.write_stamp && !ordered(cell.writer, cell.write_stamp);
    if (conflict && !suspect.address && bytes <= sizeof(suspect.before)) {
      suspect = {address, bytes, {}, cell, region, pc};
      memcpy(suspect.before, address, bytes);
    }
    note_write(*region, cell, address, from);
  });
}

// In bounds; from now on written. Atomics do not race with each other.
void check_atomic(void* pointer, size_t bytes) {
  settle();
  current->pc = __builtin_return_address(0);
  const char* address = static_cast<const char*>(pointer);
  if (uintptr_t(pointer) % bytes) stop("an atomic on %zu bytes is not aligned to them", bytes);
  const Region* region = locate(address, bytes, "updates");
  if (!region || !launch->instrumented) return;
  each_cell(*region, address, bytes, [](Cell& cell) {
    cell.write_stamp = current->stamp;
    cell.writer = own_name();
    cell.write_pc = place(current->pc);
  });
}

// -- cp.async: issued now, done when the thread waits for it

void copy_async(void* shared, const void* global, unsigned bytes, bool present) {
  current->pc = __builtin_return_address(0);
  if (uintptr_t(shared) % bytes || (present && uintptr_t(global) % bytes))
    stop("cp.async: both addresses must be aligned to %u bytes", bytes);
  if (present) access(global, bytes, Access::read, current->pc);
  access(shared, bytes, Access::write, current->pc);
  settle();
  char* to = static_cast<char*>(shared);
  const Region& region = current->block->shared;
  if (find(to) != &region) stop("cp.async: the destination must be shared memory");
  memset(to, 0xff, bytes);
  if (launch->instrumented) each_cell(region, to, bytes, [](Cell& cell) { cell.in_flight = 1; });
  current->copies.push_back({to, static_cast<const char*>(global), bytes, present});
}

void commit_copies() {
  size_t committed = 0;
  for (size_t group : current->groups) committed += group;
  current->groups.push_back(current->copies.size() - committed);
}

static void finish_copies(size_t count) {
  auto& copies = current->copies;
  for (size_t i = 0; i < count; ++i) {
    const AsyncCopy& copy = copies[i];
    if (copy.present)
      memcpy(copy.to, copy.from, copy.bytes);
    else
      memset(copy.to, 0, copy.bytes);
    if (launch->instrumented)
      each_cell(current->block->shared, copy.to, copy.bytes, [](Cell& cell) {
        cell.in_flight = 0;
        cell.write_stamp = current->stamp;
      });
  }
  copies.erase(copies.begin(), copies.begin() + count);
}

void wait_for_copies(unsigned pending_groups) {
  current->pc = __builtin_return_address(0);
  settle();
  auto& groups = current->groups;
  size_t count = 0;
  while (groups.size() > pending_groups) {
    count += groups.front();
    groups.erase(groups.begin());
  }
  finish_copies(count);
}

void wait_for_all_copies() {
  current->pc = __builtin_return_address(0);
  settle();
  current->groups.clear();
  finish_copies(current->copies.size());
}

// -- the order that barriers make

// All of the block met: everything before is ordered before everything after.
void order_block(Block& block) {
  block.floor = ++last_stamp;
  for (Thread& thread : block.threads) thread.stamp = block.floor;
}

// Some threads met: each of them now knows what any of them knew and did.
void order_threads(const std::vector<Arrival>& arrivals) {
  if (!launch->instrumented) return;
  const Block& block = *arrivals[0].thread->block;
  std::vector<uint32_t> known(block.threads.size(), 0);
  for (const Arrival& arrival : arrivals) {
    const Thread& thread = *arrival.thread;
    if (thread.known_since == block.floor)
      for (size_t i = 0; i < known.size(); ++i)
        known[i] = known[i] < thread.known[i] ? thread.known[i] : known[i];
  }
  for (const Arrival& arrival : arrivals)
    if (known[arrival.thread->id] < arrival.stamp) known[arrival.thread->id] = arrival.stamp;
  const uint32_t stamp = ++last_stamp;
  for (const Arrival& arrival : arrivals) {
    if (!arrival.waits) continue;
    arrival.thread->known = known;
    arrival.thread->known_since = block.floor;
    arrival.thread->stamp = stamp;
  }
}

// -- memory of a launch

void open_memory() {
  suspect.address = nullptr;
  regions.clear();
  for (unsigned i = 0; i < launch->tensor_count; ++i) {
    const Tensor& tensor = launch->tensors[i];
    regions.push_back(make_region(tensor.name, tensor.bytes, tensor.item_bytes > 1));
    memcpy(regions.back().begin, tensor.data, tensor.bytes);
    *static_cast<char**>(launch->arguments[tensor.argument]) = regions.back().begin;
  }
}

const char* close_memory() {
  static char text[256];
  text[0] = 0;
  for (unsigned i = 0; i < launch->tensor_count; ++i) {
    Region& region = regions[i];
    memcpy(launch->tensors[i].data, region.begin, region.bytes);
    if (!guards_hold(region) && !text[0])
      snprintf(text, sizeof(text), "writes outside of %s, which has %zu bytes", region.name,
               region.bytes);
    free_region(region);
  }
  regions.clear();
  return text[0] ? text : nullptr;
}

Region make_shared_memory() {
  const size_t dynamic = (launch->dynamic_shared + 1023) / 1024 * 1024;
  return make_region("shared memory", dynamic + kStaticShared, 1);
}

void free_region(Region& region) {
  munmap(region.begin - kGuard, whole_pages(region.bytes) + 2 * kGuard);
  munmap(region.cells, ((region.bytes >> region.cell_shift) + 1) * sizeof(Cell));
}

// NaN for whoever reads what nobody wrote, also what an earlier block left behind.
void clear_shared_memory(Block& block) {
  memset(block.shared.begin, 0xff, block.shared.bytes);
}

}  // namespace simt
