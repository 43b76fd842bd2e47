// Launch plans: what a call of an op allocates and launches, replayed without Python.
//
// A plan belongs to an op, the shapes and dtypes of its tensors, its other arguments and a device.
// The first call of such a key runs in Python, which then registers the plan. A later call makes
// the results and one scratch buffer, points the arguments of the compiled host functions at
// them and calls those through TVM FFI's C API. Everything else goes on to the kernel that Python
// registered: a key without a plan, a tensor that is not contiguous or does not start at 16 bytes.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace mhc_tile {

using torch::jit::Stack;
using Words = c10::SmallVector<int64_t, 64>;

constexpr int64_t kAlignment = 16;   // bytes that kernels read at once
constexpr int64_t kScratchAlignment = 256;

struct Result {
  std::vector<int64_t> shape;
  at::ScalarType dtype;
};

struct Argument {
  int64_t source;  // an input; behind the inputs a result; -1: the scratch buffer
  int64_t offset;  // bytes into it
  DLTensor view;   // shape and dtype; the shape lies in Plan::shapes
};

struct Launch {
  TVMFFIObjectHandle function;  // owned
  std::vector<Argument> arguments;
};

struct Plan {
  c10::Device device{c10::DeviceType::CUDA, 0};
  std::vector<Result> results;
  int64_t scratch = 0;  // bytes
  std::vector<Launch> launches;
  std::vector<std::unique_ptr<int64_t[]>> shapes;

  Plan() = default;
  Plan(const Plan&) = delete;
  ~Plan() {
    for (auto& launch : launches) TVMFFIObjectDecRef(launch.function);
  }
};

struct Hash {
  size_t operator()(const Words& words) const {
    uint64_t hash = 1469598103934665603ull;
    for (int64_t word : words) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211ull;
    return hash;
  }
};

class Plans {
 public:
  std::shared_ptr<const Plan> find(const Words& key) const {
    std::shared_lock lock(mutex_);
    auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second;
  }
  void add(Words key, std::shared_ptr<const Plan> plan) {
    std::unique_lock lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();
    plans_[std::move(key)] = std::move(plan);
  }
  void remove(const Words& key) {
    std::unique_lock lock(mutex_);
    plans_.erase(key);
  }
  void clear() {
    std::unique_lock lock(mutex_);
    plans_.clear();
  }
  size_t size() const {
    std::shared_lock lock(mutex_);
    return plans_.size();
  }

 private:
  static constexpr size_t kMost = 8192;
  mutable std::shared_mutex mutex_;
  std::unordered_map<Words, std::shared_ptr<const Plan>, Hash> plans_;
};

Plans& plans() {
  static Plans* all = new Plans;  // never destroyed: other threads may still launch at exit
  return *all;
}

// Appends what decides on the plan; false for arguments that no plan takes.
bool describe(const c10::IValue& value, Words& key) {
  if (value.isTensor()) {
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.defined()) {
      key.push_back(-1);
      return true;
    }
    if (!tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg()) return false;
    key.push_back(tensor.dim() << 8 | static_cast<int64_t>(tensor.scalar_type()));
    for (int64_t size : tensor.sizes()) key.push_back(size);
    return true;
  }
  if (value.isNone()) {
    key.push_back(-1);
  } else if (value.isDouble()) {
    int64_t bits;
    double number = value.toDouble();
    std::memcpy(&bits, &number, sizeof bits);
    key.push_back(bits);
  } else if (value.isInt()) {
    key.push_back(value.toInt());
  } else if (value.isBool()) {
    key.push_back(value.toBool());
  } else if (value.isString()) {
    key.push_back(static_cast<int64_t>(std::hash<std::string>{}(value.toStringRef())));
  } else {
    return false;
  }
  return true;
}

DLDataType dlpack(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return {kDLFloat, 32, 1};
    case at::kBFloat16: return {kDLBfloat, 16, 1};
    case at::kHalf: return {kDLFloat, 16, 1};
    case at::kInt: return {kDLInt, 32, 1};
    default: TORCH_CHECK(false, "mhc_tile: no kernel takes ", dtype);
  }
}

std::atomic<bool> on_cpu{false};  // whether tensors of the CPU may have plans: for tests
std::atomic<int64_t> replayed{0}, passed_on{0};  // calls that a plan served, and others
std::atomic<bool> paused{false};  // whether all calls go on to Python

class Stream {
 public:
  explicit Stream(c10::Device device) : index_(device.index()) {
    c10::impl::VirtualGuardImpl guard(device.type());
    type_ = device.is_cuda() ? kDLCUDA : kDLCPU;
    if (type_ == kDLCUDA)
      TVMFFIEnvSetStream(type_, index_, guard.getStream(device).native_handle(), &before_);
  }
  ~Stream() {
    if (type_ == kDLCUDA) TVMFFIEnvSetStream(type_, index_, before_, nullptr);
  }

 private:
  int32_t type_;
  int32_t index_;
  TVMFFIStreamHandle before_ = nullptr;
};

// Runs a plan. `inputs` are data pointers, `results` are filled. False if a launch failed.
bool replay(const Plan& plan, at::ArrayRef<void*> inputs, std::vector<at::Tensor>& results) {
  c10::DeviceGuard guard(plan.device);
  auto options = at::TensorOptions().device(plan.device);
  results.reserve(plan.results.size());
  for (const Result& each : plan.results)
    results.push_back(at::empty(each.shape, options.dtype(each.dtype)));
  at::Tensor scratch;
  if (plan.scratch) scratch = at::empty({plan.scratch}, options.dtype(at::kByte));
  Stream stream(plan.device);
  const int64_t count = static_cast<int64_t>(inputs.size());
  for (const Launch& launch : plan.launches) {
    c10::SmallVector<DLTensor, 16> views;
    c10::SmallVector<TVMFFIAny, 16> arguments(launch.arguments.size());
    views.reserve(launch.arguments.size());
    for (size_t i = 0; i < launch.arguments.size(); ++i) {
      const Argument& argument = launch.arguments[i];
      void* base = argument.source < 0 ? scratch.data_ptr()
                   : argument.source < count
                       ? inputs[argument.source]
                       : results[argument.source - count].data_ptr();
      views.push_back(argument.view);
      views.back().data = static_cast<char*>(base) + argument.offset;
      arguments[i] = TVMFFIAny{};
      arguments[i].type_index = kTVMFFIDLTensorPtr;
      arguments[i].v_ptr = &views.back();
    }
    TVMFFIAny nothing{};
    if (TVMFFIFunctionCall(
            launch.function, arguments.data(), static_cast<int32_t>(arguments.size()), &nothing)) {
      TVMFFIObjectHandle error = nullptr;
      TVMFFIErrorMoveFromRaised(&error);
      if (error) TVMFFIObjectDecRef(error);
      return false;
    }
  }
  return true;
}

// The key of the innermost call on this thread that has no plan yet; null where no plan can be.
thread_local const Words* missing = nullptr;

class Missing {
 public:
  explicit Missing(const Words* key) : before_(missing) { missing = key; }
  ~Missing() { missing = before_; }

 private:
  const Words* before_;
};

// The boxed kernel of every op with a plan, above the backends' kernels.
class Planned : public c10::OperatorKernel {
 public:
  Planned(int64_t op) : op_(op) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    Words key{op_, 0};
    bool may_plan = true;
    if (run(op, stack, key, may_plan)) {
      ++replayed;
      return;
    }
    ++passed_on;
    Missing mark(may_plan ? &key : nullptr);
    op.redispatchBoxed(
          keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect),
          stack);
  }

 private:
  // Whether a plan served. `may_plan`: whether the call is one that a plan could serve.
  bool run(const c10::OperatorHandle& op, Stack* stack, Words& key, bool& may_plan) {
    const size_t count = op.schema().arguments().size();
    auto arguments = torch::jit::last(*stack, count);
    c10::SmallVector<void*, 16> inputs;
    c10::Device device(c10::DeviceType::CPU);
    may_plan = false;
    if (paused) return false;
    for (const c10::IValue& value : arguments) {
      if (!describe(value, key)) return false;
      if (!value.isTensor() || !value.toTensor().defined()) continue;
      const at::Tensor& tensor = value.toTensor();
      if (inputs.empty()) {
        device = tensor.device();
        if (!device.is_cuda() && !on_cpu) return false;
        key[1] = device.index() * 32 + static_cast<int64_t>(device.type());
      } else if (tensor.device() != device) {
        return false;
      }
      void* data = tensor.data_ptr();
      if (reinterpret_cast<uintptr_t>(data) % kAlignment) return false;
      inputs.push_back(data);
    }
    may_plan = true;
    auto plan = plans().find(key);
    if (!plan) return false;
    std::vector<at::Tensor> results;
    if (!replay(*plan, inputs, results)) {
      plans().remove(key);
      may_plan = false;
      return false;
    }
    torch::jit::drop(*stack, count);
    for (at::Tensor& result : results) stack->emplace_back(std::move(result));
    return true;
  }

  const int64_t op_;
};

// Reads a plan from words: device type and index; results as (dtype, dims, sizes ...); bytes of
// scratch; launches as (function, arguments as (source, offset, dtype, dims, sizes ...)). Lists
// begin with their length.
std::shared_ptr<Plan> read(const int64_t* word) {
  auto plan = std::make_shared<Plan>();
  const auto type = static_cast<c10::DeviceType>(*word++);
  plan->device = c10::Device(type, static_cast<c10::DeviceIndex>(*word++));
  for (int64_t left = *word++; left > 0; --left) {
    const auto dtype = static_cast<at::ScalarType>(*word++);
    const int64_t dims = *word++;
    plan->results.push_back({std::vector<int64_t>(word, word + dims), dtype});
    word += dims;
  }
  plan->scratch = *word++;
  const DLDevice device{type == c10::DeviceType::CUDA ? kDLCUDA : kDLCPU, plan->device.index()};
  for (int64_t left = *word++; left > 0; --left) {
    Launch launch{reinterpret_cast<TVMFFIObjectHandle>(*word++), {}};
    TVMFFIObjectIncRef(launch.function);
    for (int64_t more = *word++; more > 0; --more) {
      Argument argument{word[0], word[1], {}};
      const auto dtype = static_cast<at::ScalarType>(word[2]);
      const int64_t dims = word[3];
      word += 4;
      auto shape = std::make_unique<int64_t[]>(2 * dims);  // and contiguous strides
      int64_t stride = 1;
      for (int64_t dim = dims - 1; dim >= 0; --dim) {
        shape[dim] = word[dim];
        shape[dims + dim] = stride;
        stride *= word[dim];
      }
      word += dims;
      argument.view = {nullptr, device, static_cast<int32_t>(dims), dlpack(dtype), shape.get(),
                       shape.get() + dims, 0};
      plan->shapes.push_back(std::move(shape));
      launch.arguments.push_back(argument);
    }
    plan->launches.push_back(std::move(launch));
  }
  return plan;
}

}  // namespace mhc_tile

// What Python calls, by ctypes.
extern "C" {

// Puts a kernel above the backends' kernels of an op.
void mhc_tile_serve(const char* name, int64_t op, bool on_cpu) {
  using namespace mhc_tile;
  static auto* library = new torch::Library(
      torch::Library::IMPL, "mhc_tile", c10::DispatchKey::BackendSelect, __FILE__, __LINE__);
  if (on_cpu) mhc_tile::on_cpu = true;
  library->impl(name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Planned>(op)));
}

// Whether the op that runs on this thread wants a plan.
bool mhc_tile_wanted() { return mhc_tile::missing != nullptr; }

// Gives the op that runs on this thread a plan.
void mhc_tile_add(const int64_t* words) {
  if (mhc_tile::missing) mhc_tile::plans().add(*mhc_tile::missing, mhc_tile::read(words));
}

void mhc_tile_pause(bool paused) { mhc_tile::paused = paused; }

void mhc_tile_clear() { mhc_tile::plans().clear(); }

// Calls since the library was loaded: served by a plan, and passed on to Python.
void mhc_tile_calls(int64_t* counts) {
  counts[0] = mhc_tile::replayed;
  counts[1] = mhc_tile::passed_on;
}

int64_t mhc_tile_count() { return static_cast<int64_t>(mhc_tile::plans().size()); }

}  // extern "C"
