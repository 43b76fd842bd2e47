// Copies from and to memory: cp.async and explicit vector loads and stores.
//
// cp.async is as late as the GPU may be: its bytes arrive when the thread waits for their group,
// and until then the destination is NaN. Reading it earlier is an error (memory.cpp).
#pragma once

#include "threads.h"

namespace tl {

template <int bytes>
SIMT_INLINE void cp_async_gs(const void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  simt::copy_async(const_cast<void*>(shared), global, bytes, true);
}
template <int bytes>
SIMT_INLINE void cp_async_gs_conditional(const void* shared, const void* global, bool present) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  simt::copy_async(const_cast<void*>(shared), global, bytes, present);
}
SIMT_INLINE void cp_async_commit() { simt::commit_copies(); }
// Waiting for all (0) includes copies that were never committed, as cp.async.wait_all does.
template <int pending_groups>
SIMT_INLINE void cp_async_wait() {
  if constexpr (pending_groups == 0)
    simt::wait_for_all_copies();
  else
    simt::wait_for_copies(pending_groups);
}

template <typename T>
SIMT_INLINE T load_as(const void* address) {
  return *static_cast<const T*>(address);
}
template <typename T>
SIMT_INLINE T load_if(const void* address, bool present) {
  return present ? load_as<T>(address) : T{};
}
template <typename T>
SIMT_INLINE void store_if(void* address, const T& value, bool present) {
  if (present) *static_cast<T*>(address) = value;
}

#define SIMT_ACCESS(bits, T)                                                                      \
  SIMT_INLINE T load_global_##bits(const void* p) { return load_as<T>(p); }                       \
  SIMT_INLINE T load_shared_##bits(const void* p) { return load_as<T>(p); }                       \
  SIMT_INLINE T load_global_##bits##_conditional(const void* p, bool on) {                        \
    return load_if<T>(p, on);                                                                     \
  }                                                                                               \
  SIMT_INLINE void store_global_##bits(void* p, T value) { store_if(p, value, true); }            \
  SIMT_INLINE void store_shared_##bits(void* p, T value) { store_if(p, value, true); }            \
  SIMT_INLINE void store_global_##bits##_conditional(void* p, T value, bool on) {                 \
    store_if(p, value, on);                                                                       \
  }
SIMT_ACCESS(32, uint32_t)
SIMT_ACCESS(64, uint2)
SIMT_ACCESS(128, uint4)
#undef SIMT_ACCESS

// 32 bytes, as any vector type of that size.
template <typename T>
SIMT_INLINE T load_global_256(const T* address) {
  static_assert(sizeof(T) == 32);
  return *address;
}
template <typename T>
SIMT_INLINE T load_global_256_conditional(const T* address, bool present) {
  return load_if<T>(address, present);
}
template <typename T>
SIMT_INLINE void store_global_256(void* address, const T& value) {
  static_assert(sizeof(T) == 32);
  store_if(address, value, true);
}
template <typename T>
SIMT_INLINE void store_global_256_conditional(void* address, const T& value, bool present) {
  store_if(address, value, present);
}

}  // namespace tl
