// Autograd of the ops in C++: the formulas that `Op._formula` and `_FusedMerge` have in Python.

#include "plans.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include <mutex>

namespace mhc_tile {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// Forward-mode AD and torch.func need formulas that only the reference has.
bool under_transforms() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) || torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

using Values = std::vector<c10::IValue>;

c10::IValue pack(Values values) { return c10::ivalue::Tuple::create(std::move(values)); }

const Values unpack(const c10::IValue& tuple) { return tuple.toTupleRef().elements().vec(); }

// What a missing cotangent is made of: a tensor's dtype, device and sizes.
c10::IValue shape_of(const Tensor& value) {
  Values found{static_cast<int64_t>(value.scalar_type()), value.device()};
  for (const auto& size : value.sym_sizes()) found.emplace_back(size);
  return pack(std::move(found));
}

Tensor filled(const Tensor& grad, const c10::IValue& shape) {
  if (grad.defined()) return grad;
  const auto known = unpack(shape);
  std::vector<c10::SymInt> sizes;
  for (size_t i = 2; i < known.size(); ++i) sizes.push_back(known[i].toSymInt());
  auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(known[0].toInt()));
  return at::zeros_symint(sizes, options.device(known[1].toDevice()));
}

enum Source : int64_t { kCotangent, kInput, kOutput };

// How the backward of an op is called.
struct Formula {
  c10::OperatorHandle backward;
  int64_t tensors, results, kept;
  std::vector<std::pair<int64_t, int64_t>> reads;  // Source, index
  std::vector<int64_t> arguments;  // an input of the op; -1 - t * 8 - d: the size of tensor t's dim -d
};

struct Site {
  const c10::OperatorHandle* op;
  c10::DispatchKeySet keys;
  const Formula* formula;
  Stack* stack;
};

struct OpFunction : torch::autograd::Function<OpFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, Site site) {
    const Formula& formula = *site.formula;
    const auto& schema = site.op->schema().arguments();
    Stack stack = *site.stack;
    Values arguments, constants, shapes;
    for (size_t i = 0; i < schema.size(); ++i)
      if (schema[i].kwarg_only()) constants.push_back(stack[i]);
    for (int64_t source : formula.arguments)
      if (source >= 0)
        arguments.push_back(stack[source]);
      else
        arguments.emplace_back(tensors[(-1 - source) / 8].sym_size(-((-1 - source) % 8)));
    {
      at::AutoDispatchBelowAutograd guard;
      site.op->redispatchBoxed(site.keys & c10::after_autograd_keyset, &stack);
    }
    variable_list outputs;
    for (auto& value : stack) outputs.push_back(value.toTensor());
    for (int64_t i = 0; i < formula.results; ++i) shapes.push_back(shape_of(outputs[i]));
    variable_list saved;
    for (auto [source, index] : formula.reads)
      if (source != kCotangent) saved.push_back(source == kInput ? tensors[index] : outputs[index]);
    ctx->save_for_backward(std::move(saved));
    ctx->mark_non_differentiable(variable_list(outputs.begin() + formula.results, outputs.end()));
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = pack(
        {reinterpret_cast<int64_t>(&formula), pack(arguments), pack(constants), pack(shapes)});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto kept = unpack(ctx->saved_data["call"]);
    const Formula& formula = *reinterpret_cast<const Formula*>(kept[0].toInt());
    const auto shapes = unpack(kept[3]);
    auto saved = ctx->get_saved_variables();
    Stack stack;
    size_t next = 0;
    for (auto [source, index] : formula.reads)
      stack.emplace_back(
          source == kCotangent ? filled(grads[index], shapes[index]) : saved[next++]);
    for (const auto& value : unpack(kept[1])) stack.push_back(value);
    for (const auto& argument : formula.backward.schema().arguments())
      if (!argument.kwarg_only() && stack.size() < static_cast<size_t>(argument_count(formula)))
        stack.emplace_back();  // an optional tensor
    for (const auto& value : unpack(kept[2])) stack.push_back(value);
    formula.backward.callBoxed(stack);
    variable_list found;
    for (auto& value : stack) found.push_back(value.toTensor());
    found.emplace_back();  // of the site
    return found;
  }

 private:
  static int64_t argument_count(const Formula& formula) {
    int64_t count = 0;
    for (const auto& argument : formula.backward.schema().arguments())
      count += !argument.kwarg_only();
    return count;
  }
};

// The autograd kernel of an op on CUDA tensors. Without a formula, as the backward ops are, Python
// differentiates: its kernel is still that of other backends.
class Differentiable : public c10::OperatorKernel {
 public:
  explicit Differentiable(std::unique_ptr<Formula> formula) : formula_(std::move(formula)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const size_t count = op.schema().arguments().size();
    auto arguments = torch::jit::last(*stack, count);
    const bool transformed = under_transforms();
    bool needed = false;
    if (at::GradMode::is_enabled())
      for (const auto& value : arguments)
        needed = needed || (value.isTensor() && value.toTensor().requires_grad());
    if (transformed || (needed && !formula_)) {
      op.callBoxedForDispatchKey(c10::DispatchKey::AutogradXPU, *stack);
      return;
    }
    if (!needed) {
      at::AutoDispatchBelowAutograd guard;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
      return;
    }
    variable_list tensors;
    for (int64_t i = 0; i < formula_->tensors; ++i) tensors.push_back(arguments[i].toTensor());
    Stack own(arguments.begin(), arguments.end());
    torch::jit::drop(*stack, count);
    auto outputs = OpFunction::apply(at::TensorList(tensors), Site{&op, keys, formula_.get(), &own});
    for (auto& value : outputs) stack->emplace_back(std::move(value));
  }

 private:
  std::unique_ptr<Formula> formula_;
};

c10::OperatorHandle handle(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("mhc_tile::" + name).c_str(), "");
}

// An op that the fused merge calls.
struct Known {
  explicit Known(const std::string& name) : handle(mhc_tile::handle(name)), number(number_of(name)) {}
  c10::OperatorHandle handle;
  int64_t number;
};

const Known& known(const char* name) {
  static std::mutex mutex;
  static auto* all = new std::unordered_map<std::string, Known>;
  std::lock_guard lock(mutex);
  return all->try_emplace(name, name).first->second;
}

using Given = c10::SmallVector<const Tensor*, 12>;  // undefined: an optional tensor that is not given

Call describe(const Known& op, const Given& tensors, const Values& constants) {
  Call call(op.number);
  for (const Tensor* tensor : tensors) call.add(*tensor);
  for (const auto& constant : constants) call.add(constant);
  return call;
}

// The results of an op, by its plan or by the dispatcher.
Results invoke(const Known& op, const Given& tensors, const Values& constants) {
  if (op.number >= 0 && unobserved()) {
    Call call = describe(op, tensors, constants);
    if (auto results = replay(call)) return std::move(*results);
  }
  Stack stack;
  for (const Tensor* tensor : tensors)
    stack.push_back(tensor->defined() ? c10::IValue(*tensor) : c10::IValue());
  stack.insert(stack.end(), constants.begin(), constants.end());
  op.handle.callBoxed(stack);
  Results results;
  for (auto& value : stack) results.push_back(value.toTensor());
  return results;
}

// The constants of all calls, each once. A number is cheaper to keep in a graph than five values.
const Values& constants_of(int64_t index) {
  static auto* none = new Values;
  return index < 0 ? *none : *reinterpret_cast<const Values*>(index);
}

int64_t kept(const Values& constants) {
  static std::mutex mutex;
  static auto* all = new std::vector<std::unique_ptr<const Values>>;
  if (constants.empty()) return -1;
  std::lock_guard lock(mutex);
  auto same = [&](const auto& one) {
    return std::equal(one->begin(), one->end(), constants.begin(), [](const auto& a, const auto& b) {
      return a.isInt() ? a.toInt() == b.toInt() : a.toDouble() == b.toDouble();
    });
  };
  auto found = std::find_if(all->begin(), all->end(), same);
  if (found == all->end()) {
    all->push_back(std::make_unique<const Values>(constants));
    found = all->end() - 1;
  }
  return reinterpret_cast<int64_t>(found->get());
}

Tensor share(const Tensor& value) {  // another output with the same values
  return Tensor(value.unsafeGetTensorImpl()->shallow_copy_and_detach(
      torch::autograd::impl::version_counter(value), /*allow_tensor_metadata_change=*/true));
}

using Optional = std::optional<Tensor>;

const Tensor& given(const Optional& value) {
  static const Tensor none;
  return value ? *value : none;
}

struct Streams {  // x, hidden from autograd, which has no gradient for it
  const Tensor* x;
};

// The merge of one sublayer, if layer_output is given; the pre of the next, if phi is given.
// A tensor that is not given is undefined.
struct FusedMerge : torch::autograd::Function<FusedMerge> {
  static Results compute(
      const Tensor& x, const Tensor& layer_output, const Tensor& h_post, const Tensor& h_res,
      const Tensor& phi, const Tensor& alpha, const Tensor& bias, const Values& constants) {
    const auto [op, tensors] = chosen(x, layer_output, h_post, h_res, phi, alpha, bias);
    return invoke(*op, tensors, constants);
  }

  static std::pair<const Known*, Given> chosen(
      const Tensor& x, const Tensor& layer_output, const Tensor& h_post, const Tensor& h_res,
      const Tensor& phi, const Tensor& alpha, const Tensor& bias) {
    static const Known &pre = known("pre"), &merge = known("merge"), &boundary = known("boundary");
    Given tensors{&x};
    if (layer_output.defined()) tensors.append({&layer_output, &h_post, &h_res});
    if (!phi.defined()) return {&merge, tensors};
    tensors.append({&phi, &alpha, &bias});
    return {layer_output.defined() ? &boundary : &pre, tensors};
  }

  static variable_list forward(
      AutogradContext* ctx, const Tensor& x_for_merge, Streams streams, const Optional& layer_output,
      const Optional& h_post, const Optional& h_res, const Optional& phi, const Optional& alpha,
      const Optional& bias, const Values* constants) {
    at::AutoDispatchBelowAutograd guard;
    const bool merges = layer_output.has_value(), maps = phi.has_value();
    const Tensor& x = streams.x->defined() ? *streams.x : x_for_merge;
    auto results = compute(
        x_for_merge, given(layer_output), given(h_post), given(h_res), given(phi), given(alpha),
        given(bias), *constants);
    variable_list saved, outputs;
    saved.reserve(10);
    if (!maps) {
      outputs = std::move(results);
    } else {
      const size_t first = merges;  // x_next comes before the maps
      outputs = {results[first], results[first + 1], results[first + 2],
                 merges ? results[0] : share(x_for_merge)};
      if (merges) outputs.push_back(share(results[0]));
      saved = {merges ? outputs.back() : x_for_merge, *phi, *alpha, *bias, results[first + 3],
               results[first + 4], outputs[2]};
    }
    if (merges) saved.insert(saved.end(), {x, *layer_output, *h_post});
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(!maps);
    ctx->saved_data["constants"] = kept(*constants);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const Known& pre_backward = known("pre_backward");
    static const Known& merge_backward_maps = known("_merge_backward_maps");
    const Values& constants = constants_of(ctx->saved_data["constants"].toInt());
    const auto saved = ctx->get_saved_variables();
    const bool maps = !constants.empty(), merges = saved.size() != 7;
    variable_list found(9);  // as the arguments of forward
    Tensor& grad_x_next = found[0];
    grad_x_next = grads[0];
    if (maps) {
      const Tensor& h_res = saved[6];
      if (!grads[0].defined()) grads[0] = at::zeros_like(saved[0].select(-2, 0));
      if (!grads[1].defined()) grads[1] = at::zeros_like(h_res.select(-1, 0));
      if (!grads[2].defined()) grads[2] = at::zeros_like(h_res);
      Given tensors{&grads[0], &grads[1], &grads[2]};
      for (int i = 0; i < 6; ++i) tensors.push_back(&saved[i]);
      const Tensor none;
      tensors.append({&grads[3], grads[3].defined() ? &h_res : &none});
      auto results = invoke(pre_backward, tensors, constants);
      grad_x_next = grads.size() > 4 && grads[4].defined() ? results[0] + grads[4] : results[0];
      std::move(results.begin() + 1, results.end(), found.begin() + 5);
    }
    if (merges) {
      const size_t first = saved.size() - 3;
      auto results = invoke(
          merge_backward_maps,
          {&grad_x_next, &saved[first], &saved[first + 1], &saved[first + 2]}, {});
      std::move(results.begin(), results.end(), found.begin() + 2);
    }
    return found;
  }
};

// The results of `FusedMerge`, or without grad mode layer_input, h_post, h_res and x_next. With
// `planned` nothing where the call has no plan: its arguments may still need checks.
variable_list fused_merge(
    const Tensor& x_for_merge, const Optional& x, const Optional& layer_output,
    const Optional& h_post, const Optional& h_res, const Optional& phi, const Optional& alpha,
    const Optional& bias, std::optional<double> norm_eps, std::optional<double> pre_eps, std::optional<double> post_scale,
    std::optional<int64_t> iters, std::optional<double> sinkhorn_eps, bool planned) {
  const Tensor &output = given(layer_output), &post = given(h_post), &res = given(h_res);
  const Tensor &rows = given(phi), &gates = given(alpha), &shift = given(bias);
  Values constants;
  if (phi) constants = {*norm_eps, *pre_eps, *post_scale, *iters, *sinkhorn_eps};
  if (planned) {
    if (under_transforms() || !unobserved()) return {};
    const auto [op, tensors] = FusedMerge::chosen(x_for_merge, output, post, res, rows, gates, shift);
    if (!has_plan(describe(*op, tensors, constants))) return {};
  }
  // under autocast x keeps its dtype and the maps stay fp32
  c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  if (at::GradMode::is_enabled())
    return FusedMerge::apply(
        x_for_merge, Streams{&given(x)}, layer_output, h_post, h_res, phi, alpha, bias, &constants);
  auto results = FusedMerge::compute(x_for_merge, output, post, res, rows, gates, shift, constants);
  if (!phi) return results;
  if (!layer_output) return {results[0], results[1], results[2]};
  return {results[1], results[2], results[3], results[0]};
}

TORCH_LIBRARY(mhc_tile_native, library) {
  library.def(
      "fused_merge(Tensor x_for_merge, Tensor? x, Tensor? layer_output, Tensor? h_post, "
      "Tensor? h_res, Tensor? phi, Tensor? alpha, Tensor? bias, float? norm_eps, float? pre_eps, "
      "float? post_scale, int? iters, float? sinkhorn_eps, bool planned) -> Tensor[]",
      torch::CppFunction(torch::dispatch(
          c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(fused_merge))));
}

}  // namespace mhc_tile

extern "C" {

// Puts an autograd kernel in front of Python's on CUDA tensors, or the CPU's in tests. `words`: 0
// without a formula, else tensors, results, kept; sources and indices of what the backward reads;
// its arguments. Lists begin with their length.
void mhc_tile_differentiate(const char* name, const int64_t* word, bool on_cpu) {
  using namespace mhc_tile;
  static auto* library = new torch::Library(
      torch::Library::IMPL, "mhc_tile",
      on_cpu ? c10::DispatchKey::AutogradCPU : c10::DispatchKey::AutogradCUDA, __FILE__, __LINE__);
  std::unique_ptr<Formula> formula;
  if (*word) {
    formula.reset(new Formula{handle(std::string(name) + "_backward"), word[0], word[1], word[2], {}, {}});
    word += 3;
    for (int64_t left = *word++; left > 0; --left, word += 2) formula->reads.emplace_back(word[0], word[1]);
    for (int64_t left = *word++; left > 0; --left) formula->arguments.push_back(*word++);
  }
  library->impl(name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Differentiable>(std::move(formula))));
}

}  // extern "C"
