// What the lanes of a warp do together: shuffles, votes, ldmatrix, stmatrix, mma.sync.

#include <cmath>
#include <cstring>

#include "state.h"

namespace simt {
namespace {

using Slots = unsigned char (*)[64];

Warp& warp() { return current->block->warps[current->id / kWarp]; }
unsigned lane() { return current->id % kWarp; }

// The lanes of the current warp that exist: the last warp of a block may be partial.
unsigned existing_lanes() {
  const unsigned left = current->block->threads.size() - current->id / kWarp * kWarp;
  return left >= kWarp ? ~0u : (1u << left) - 1;
}

Meeting& meeting_of(unsigned mask) {
  auto& meetings = warp().meetings;
  for (auto& meeting : meetings)
    if (meeting->mask == mask) return *meeting;
  meetings.push_back(std::make_unique<Meeting>());
  meetings.back()->mask = mask;
  return *meetings.back();
}

// Hands in `bytes` and waits for the other lanes of `mask`; returns what each of them handed in.
// A lane that is not part of the meeting reads as NaN.
Slots meet(const char* what, unsigned mask, const void* mine, size_t bytes) {
  settle();
  mask &= existing_lanes();
  if (!(mask >> lane() & 1)) stop("%s: lane %u is not in its own mask %08x", what, lane(), mask);
  Meeting& meeting = meeting_of(mask);
  Slots slots = meeting.slots[meeting.turn];
  if (!meeting.arrived) {
    meeting.what = what;
    memset(slots, 0xff, sizeof(meeting.slots[0]));
  } else if (strcmp(meeting.what, what)) {
    stop("divergent warp: lane %u is at %s while others of its mask %08x are at %s", lane(), what,
         mask, meeting.what);
  }
  if (bytes) memcpy(slots[lane()], mine, bytes);
  meeting.arrived |= 1u << lane();
  if (meeting.arrived != mask) {
    meeting.waiting.push_back(current);
    wait(what);
    return slots;
  }
  meeting.arrived = 0;
  meeting.turn ^= 1;
  ++progress;
  for (Thread* thread : meeting.waiting) wake(thread);
  meeting.waiting.clear();
  return slots;
}

// The element-th value of a register that holds one tf32 or two 16-bit values.
float decode(unsigned word, Element kind, int element) {
  uint32_t bits = word & ~0x1fffu;  // the tensor core drops what tf32 has no room for
  if (kind != Element::tfloat32) {
    const uint16_t narrow = static_cast<uint16_t>(word >> (16 * element));
    if (kind == Element::float16) {
      _Float16 value;
      memcpy(&value, &narrow, 2);
      return value;
    }
    bits = uint32_t(narrow) << 16;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

#define SIMT_ENTER current->pc = __builtin_return_address(0)

void shuffle(unsigned mask, void* value, size_t bytes, int source) {
  SIMT_ENTER;
  Slots slots = meet("a shuffle", mask, value, bytes);
  memcpy(value, slots[unsigned(source) % kWarp], bytes);
}

unsigned ballot(unsigned mask, bool predicate) {
  SIMT_ENTER;
  Slots slots = meet("a vote", mask, &predicate, 1);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= unsigned(slots[i][0] == 1) << i;
  return votes;
}

void warp_barrier(unsigned mask) {
  SIMT_ENTER;
  Slots slots = meet("__syncwarp", mask, &current->stamp, sizeof(current->stamp));
  // The first lane to go on orders all of them; the slots still hold the stamps they came with.
  uint32_t stamp;
  memcpy(&stamp, slots[lane()], sizeof(stamp));
  if (stamp != current->stamp) return;
  std::vector<Arrival> arrivals;
  Thread* first = &current->block->threads[current->id / kWarp * kWarp];
  mask &= existing_lanes();
  for (unsigned i = 0; i < kWarp; ++i)
    if (mask >> i & 1) arrivals.push_back({first + i, first[i].stamp, true});
  order_threads(arrivals);
}

// Each 8 x 8 matrix of 16-bit values has its rows at the addresses of eight lanes. Lane 4r + c gets
// elements 2c and 2c + 1 of row r, or of column r if transposed.
void load_matrices(const void* row, void* registers, int count, bool transpose) {
  SIMT_ENTER;
  const bool reads = lane() < 8u * count;
  if (reads && uintptr_t(row) % 16) stop("ldmatrix: a row must be aligned to 16 bytes");
  if (reads) access(row, 16, Access::read, current->pc);
  Slots slots = meet("ldmatrix", ~0u, row, reads ? 16 : 0);
  const unsigned r = lane() / 4, c = lane() % 4 * 2;
  uint16_t result[8];
  for (int matrix = 0; matrix < count; ++matrix)
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned from = transpose ? c + e : r, column = transpose ? r : c + e;
      memcpy(&result[matrix * 2 + e], slots[matrix * 8 + from] + 2 * column, 2);
    }
  memcpy(registers, result, 4 * count);
}

void store_matrices(void* row, const unsigned* registers, int count, bool transpose) {
  SIMT_ENTER;
  Slots slots = meet("stmatrix", ~0u, registers, 4 * count);
  if (lane() >= 8u * count) return;
  if (uintptr_t(row) % 16) stop("stmatrix: a row must be aligned to 16 bytes");
  const unsigned matrix = lane() / 8, own = lane() % 8;
  uint16_t values[8];
  for (unsigned other = 0; other < 8; ++other) {
    const unsigned r = transpose ? other : own, c = transpose ? own : other;
    memcpy(&values[other], slots[r * 4 + c / 2] + 4 * matrix + 2 * (c % 2), 2);
  }
  access(row, 16, Access::write, current->pc);
  memcpy(row, values, 16);
}

// Lane 4g + t holds of A the rows g and g + 8, of B the column g, and of C the columns 2t and
// 2t + 1; elements along k go to lanes t, two at a time if they have 16 bits. Products are exact and
// their sum is rounded once: the GPU's tensor core rounds less carefully.
void multiply(float* c, const unsigned* a, const unsigned* b, Element kind, int k) {
  SIMT_ENTER;
  const int width = kind == Element::tfloat32 ? 1 : 2;  // values of a register
  const int steps = k / (4 * width);                    // registers of B; A has one more per row
  struct {
    float a[2][2][2], b[2][2];  // [step][upper or lower row][value], [step][value]
  } mine = {};
  for (int step = 0; step < steps; ++step)
    for (int value = 0; value < width; ++value) {
      mine.b[step][value] = decode(b[step], kind, value);
      for (int lower = 0; lower < 2; ++lower)
        mine.a[step][lower][value] = decode(a[2 * step + lower], kind, value);
    }
  Slots slots = meet("mma.sync", ~0u, &mine, sizeof(mine));
  auto lane_of = [&](unsigned row_or_column, int t) {
    return reinterpret_cast<const decltype(mine)*>(slots[row_or_column * 4 + t]);
  };
  const unsigned g = lane() / 4, t = lane() % 4;
  const Subnormals count;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int from = 0; from < 4; ++from) {
      const auto *left = lane_of(g, from), *right = lane_of(2 * t + i % 2, from);
      for (int step = 0; step < steps; ++step)
        for (int value = 0; value < width; ++value)
          sum += double(left->a[step][i / 2][value]) * right->b[step][value];
    }
    c[i] = float(sum);
  }
}

float multiply_add(float a, float b, float c) {
  volatile float factors[] = {a, b, c};  // nothing is computed earlier, or later
  const Subnormals count;
  factors[0] = fmaf(factors[0], factors[1], factors[2]);
  return factors[0];
}

}  // namespace simt
