// What a kernel's generated CUDA source needs in order to compile as host C++.
//
// tests/emulator.py puts this file in place of TileLang's device templates. One header per theme;
// everything that touches threads or memory ends in runtime.h, which scheduler.cpp, memory.cpp,
// collectives.cpp and hooks.cpp implement. Names outside of namespace simt are CUDA's and
// TileLang's own.
#pragma once

#include "qualifiers.h"

#include "vectors.h"

#include "floats.h"

#include "maths.h"
#include "packed.h"
#include "threads.h"

#include "atomic.h"
#include "copy.h"
#include "matrix.h"
#include "reduce.h"
