// Calls of ops that a launch plan can serve. See plans.cpp.

#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <string>
#include <vector>

namespace mhc_tile {

using Words = c10::SmallVector<int64_t, 64>;
using Results = std::vector<at::Tensor>;

// One call: what decides on its plan, and the memory of its inputs. Arguments are added in the
// order of the schema.
class Call {
 public:
  explicit Call(int64_t op) : key{op, 0} {}

  void add(const at::Tensor& tensor);  // maybe undefined: an optional one that is not given
  void add(const c10::IValue& value);

  Words key;
  c10::SmallVector<void*, 16> inputs;
  c10::Device device{c10::DeviceType::CPU};
  bool plannable = true;  // whether a plan could serve it
};

// Whether this thread's calls may go past the dispatcher: no mode and no profiler wants to see them.
bool unobserved();

// The number of an op that `mhc_tile_serve` has given; -1 without one.
int64_t number_of(const std::string& name);

// Whether the call has a plan.
bool has_plan(const Call& call);

// The results by the plan of the call; none where it has none or a launch fails.
std::optional<Results> replay(Call& call);

}  // namespace mhc_tile
