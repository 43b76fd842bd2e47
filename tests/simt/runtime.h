// What a compiled kernel asks of the emulator: which thread am I, wait for others, move these bytes.
//
// The functions here are compiled once, without the compiler's memory hooks. Every one of them may
// end the run: an error leaves the thread for good and is reported by simt_launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qualifiers.h"

namespace simt {

// -- who am I (scheduler.cpp)
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned linear_thread();  // x fastest; lane = linear_thread() % 32

// -- shared memory of the current block (scheduler.cpp)
void* dynamic_shared();
// The declaration'th __shared__ array of the source: the same place in every block.
void* static_shared(unsigned declaration, size_t bytes);

// -- barriers (scheduler.cpp)
void block_barrier();
void named_barrier(int id, int threads);  // threads 0: the whole block
void named_arrive(int id, int threads);
void grid_barrier();
void warp_barrier(unsigned mask);
void yield();          // lets other threads run before a polled location is read again
void note_progress();  // a polled location may have changed
[[noreturn]] void reject(const char* reason);  // ends the run with an error

// -- what lanes tell each other (collectives.cpp); each waits for every live lane of `mask`
// Replaces value's bytes by what `source` handed in.
void shuffle(unsigned mask, void* value, size_t bytes, int source);
unsigned ballot(unsigned mask, bool predicate);
void load_matrices(const void* row, void* registers, int count, bool transpose);
void store_matrices(void* row, const unsigned* registers, int count, bool transpose);
enum class Element { bfloat16, float16, tfloat32 };
// c += a @ b for one m16n8k tile; k elements in the layout of PTX mma.sync.
void multiply(float* c, const unsigned* a, const unsigned* b, Element element, int k);

// a * b + c, where subnormal numbers count whatever the kernel's flags (collectives.cpp)
float multiply_add(float a, float b, float c);

// -- memory that the compiler's hooks do not see (memory.cpp)
void copy_async(void* shared, const void* global, unsigned bytes, bool present);
void commit_copies();
void wait_for_copies(unsigned pending_groups);  // all but the newest `pending_groups`
void wait_for_all_copies();
void check_atomic(void* address, size_t bytes);

}  // namespace simt
