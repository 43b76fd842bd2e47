// Atomics on device memory: plain operations, because threads change places only where they wait.
//
// Memory orders are not modelled. A load lets every other thread run first, so that a loop that
// polls a flag ends; an atomic never counts as one side of a race.
#pragma once

#include "threads.h"

namespace simt {

template <typename T, typename Update>
SIMT_RAW T atomic_update(T* address, Update update) {
  check_atomic(address, sizeof(T));
  const T before = *address, after = update(before);
  *address = after;
  if (memcmp(&before, &after, sizeof(T))) note_progress();
  return before;
}

}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                                    \
  template <typename T, typename U>                                                      \
  SIMT_INLINE void name(T* address, U operand, int = 0) {                                \
    const T value = T(operand);                                                          \
    simt::atomic_update(address, [value](T before) { return T(expression); });           \
  }                                                                                      \
  template <typename T, typename U>                                                      \
  SIMT_INLINE T name##Ret(T* address, U operand, int = 0) {                              \
    const T value = T(operand);                                                          \
    return simt::atomic_update(address, [value](T before) { return T(expression); });    \
  }
SIMT_ATOMIC(AtomicAdd, before + value)
SIMT_ATOMIC(AtomicMax, before < value ? value : before)
SIMT_ATOMIC(AtomicMin, value < before ? value : before)
SIMT_ATOMIC(AtomicOr, before | value)
SIMT_ATOMIC(AtomicAnd, before & value)
#undef SIMT_ATOMIC

template <typename T>
SIMT_INLINE T AtomicLoad(const T* address, int) {
  simt::yield();
  return simt::atomic_update(const_cast<T*>(address), [](T before) { return before; });
}
template <typename T, typename U>
SIMT_INLINE void AtomicStore(T* address, U value, int) {
  simt::atomic_update(address, [value](T) { return T(value); });
}

SIMT_INLINE void AtomicAddx2(float* address, float2 value, int = 0) {
  AtomicAdd(address, value.x);
  AtomicAdd(address + 1, value.y);
}
SIMT_INLINE void AtomicAddx4(float* address, float4 value, int = 0) {
  AtomicAddx2(address, {value.x, value.y});
  AtomicAddx2(address + 2, {value.z, value.w});
}
