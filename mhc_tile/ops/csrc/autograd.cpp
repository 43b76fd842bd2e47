// Autograd of the ops in C++: the formulas that `Op._formula` and `_FusedMerge` have in Python.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include <vector>

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

struct Call {
  const c10::OperatorHandle* op;
  c10::DispatchKeySet keys;
  const Formula* formula;
  Stack* stack;
};

struct OpFunction : torch::autograd::Function<OpFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, Call call) {
    const Formula& formula = *call.formula;
    const auto& schema = call.op->schema().arguments();
    Stack stack = *call.stack;
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
      call.op->redispatchBoxed(call.keys & c10::after_autograd_keyset, &stack);
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
    found.emplace_back();  // of the call
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
    auto outputs = OpFunction::apply(at::TensorList(tensors), Call{&op, keys, formula_.get(), &own});
    for (auto& value : outputs) stack->emplace_back(std::move(value));
  }

 private:
  std::unique_ptr<Formula> formula_;
};

c10::OperatorHandle handle(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("mhc_tile::" + name).c_str(), "");
}

variable_list call(const c10::OperatorHandle& op, Stack stack) {
  op.callBoxed(stack);
  variable_list found;
  for (auto& value : stack) found.push_back(value.toTensor());
  return found;
}

Tensor share(const Tensor& value) {  // another output with the same values
  Tensor other = value.alias();
  torch::autograd::impl::set_version_counter(other, torch::autograd::impl::version_counter(value));
  return other;
}

struct Streams {  // x, hidden from autograd, which has no gradient for it
  std::optional<Tensor> x;
};

using Optional = std::optional<Tensor>;

// The merge of one sublayer, if layer_output is given; the pre of the next, if phi is given.
struct FusedMerge : torch::autograd::Function<FusedMerge> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x_for_merge, Streams streams, const Optional& layer_output,
      const Optional& h_post, const Optional& h_res, const Optional& phi, const Optional& alpha,
      const Optional& bias, const Stack* constants) {
    static const auto pre = handle("pre"), merge = handle("merge"), boundary = handle("boundary");
    at::AutoDispatchBelowAutograd guard;
    const bool merges = layer_output.has_value(), maps = phi.has_value();
    Values shapes;
    const Tensor& x = streams.x ? *streams.x : x_for_merge;
    variable_list saved, outputs;
    if (!maps) {
      outputs = call(merge, {x_for_merge, *layer_output, *h_post, *h_res});
    } else {
      Stack stack{x_for_merge};
      if (merges) stack.insert(stack.end(), {*layer_output, *h_post, *h_res});
      stack.insert(stack.end(), {*phi, *alpha, *bias});
      stack.insert(stack.end(), constants->begin(), constants->end());
      auto results = call(merges ? boundary : pre, std::move(stack));
      Tensor x_next = x_for_merge;
      if (merges) {
        x_next = results[0];
        results.erase(results.begin());
      }
      for (int i = 0; i < 3; ++i) shapes.push_back(shape_of(results[i]));
      outputs = {results[0], results[1], results[2], merges ? x_next : share(x_next)};
      if (merges) outputs.push_back(share(x_next));
      saved = {merges ? outputs.back() : x_for_merge, *phi, *alpha, *bias, results[3], results[4], results[2]};
    }
    if (merges) saved.insert(saved.end(), {x, *layer_output, *h_post});
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(!maps);
    ctx->saved_data["call"] =
        pack({merges, maps, pack(maps ? *constants : Values{}), pack(shapes)});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto pre_backward = handle("pre_backward");
    static const auto merge_backward_maps = handle("_merge_backward_maps");
    const auto kept = unpack(ctx->saved_data["call"]);
    const bool merges = kept[0].toBool(), maps = kept[1].toBool();
    const auto constants = unpack(kept[2]), shapes = unpack(kept[3]);
    auto saved = ctx->get_saved_variables();
    Tensor grad_x_next = grads[0];
    variable_list grad_parameters(3), grad_merged(3);
    if (maps) {
      Stack stack;
      for (int i = 0; i < 3; ++i) stack.emplace_back(filled(grads[i], shapes[i]));
      for (int i = 0; i < 6; ++i) stack.emplace_back(saved[i]);
      if (grads[3].defined()) {
        stack.emplace_back(grads[3]);
        stack.emplace_back(saved[6]);
      } else {
        stack.resize(stack.size() + 2);
      }
      // all constants but norm_eps, which the schema has as well
      stack.insert(stack.end(), constants.begin(), constants.end());
      auto found = call(pre_backward, std::move(stack));
      grad_x_next = grads.size() > 4 && grads[4].defined() ? found[0] + grads[4] : found[0];
      std::copy(found.begin() + 1, found.end(), grad_parameters.begin());
      saved.erase(saved.begin(), saved.begin() + 7);
    }
    if (merges) {
      Stack stack{grad_x_next};
      for (const Tensor& value : saved) stack.emplace_back(value);
      grad_merged = call(merge_backward_maps, std::move(stack));
    }
    variable_list found{grad_x_next, Tensor()};
    found.insert(found.end(), grad_merged.begin(), grad_merged.end());
    found.insert(found.end(), grad_parameters.begin(), grad_parameters.end());
    found.emplace_back();
    return found;
  }
};

// Without phi there are no constants.
variable_list fused_merge(
    const Tensor& x_for_merge, const Optional& x, const Optional& layer_output,
    const Optional& h_post, const Optional& h_res, const Optional& phi, const Optional& alpha,
    const Optional& bias, std::optional<double> norm_eps, std::optional<double> pre_eps,
    std::optional<double> post_scale, std::optional<int64_t> iters,
    std::optional<double> sinkhorn_eps) {
  // under autocast x keeps its dtype and the maps stay fp32
  c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  Stack constants;
  if (phi) constants = {*norm_eps, *pre_eps, *post_scale, *iters, *sinkhorn_eps};
  return FusedMerge::apply(
      x_for_merge, Streams{x}, layer_output, h_post, h_res, phi, alpha, bias, &constants);
}

TORCH_LIBRARY(mhc_tile_native, library) {
  library.def(
      "fused_merge(Tensor x_for_merge, Tensor? x, Tensor? layer_output, Tensor? h_post, "
      "Tensor? h_res, Tensor? phi, Tensor? alpha, Tensor? bias, float? norm_eps, float? pre_eps, "
      "float? post_scale, int? iters, float? sinkhorn_eps) -> Tensor[]",
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
