// Where the compiler reports the kernel's own loads and stores.
//
// Kernels are compiled with -fsanitize=thread,alignment,bounds and linked with these functions in
// place of the sanitizers' runtimes. The names and arguments are those that g++ and clang call.

#include "state.h"

using simt::Access;

#define SIMT_HOOK(name, bytes)                                                              \
  extern "C" void __tsan_read##name(void* address) {                                        \
    simt::access(address, bytes, Access::read, __builtin_return_address(0));                \
  }                                                                                         \
  extern "C" void __tsan_write##name(void* address) {                                       \
    simt::access(address, bytes, Access::write, __builtin_return_address(0));               \
  }                                                                                         \
  extern "C" void __tsan_unaligned_read##name(void* address) {                              \
    simt::access(address, bytes, Access::read, __builtin_return_address(0));                \
  }                                                                                         \
  extern "C" void __tsan_unaligned_write##name(void* address) {                             \
    simt::access(address, bytes, Access::write, __builtin_return_address(0));               \
  }
SIMT_HOOK(1, 1)
SIMT_HOOK(2, 2)
SIMT_HOOK(4, 4)
SIMT_HOOK(8, 8)
SIMT_HOOK(16, 16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  simt::access(address, bytes, Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  simt::access(address, bytes, Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// Only the head of what the compiler passes: its own place is found from the return address.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
  const void* pointer = reinterpret_cast<const void*>(address);
  if (simt::on_own_stack(pointer)) return;  // a local array: registers on the GPU
  simt::current->pc = __builtin_return_address(0);
  simt::stop("misaligned access: a vector load or store needs an address aligned to its size");
}
extern "C" void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  simt::current->pc = __builtin_return_address(0);
  simt::stop("index %td is outside of a local or __shared__ array", ptrdiff_t(index));
}
