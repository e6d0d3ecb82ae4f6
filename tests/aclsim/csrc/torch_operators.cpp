// torch's own operators on the simulated NPU, registered over those of torch_npu: one boxed kernel for all that have a
// CPU kernel, and the composition that torch itself defines for those that torch_npu fuses.
#include "torch_operators.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "control.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace torch_operators {
namespace {

// No backend of that name registers anything, so at this key torch computes a composite operator by its composition.
constexpr auto kComposition = c10::DispatchKey::AutogradVE;
constexpr auto kNpuKey = c10::DispatchKey::PrivateUse1;
constexpr auto kAutogradNpuKey = c10::DispatchKey::AutogradPrivateUse1;
constexpr auto kFlashAttention = 1;  // sdp::SDPBackend
constexpr int kDeviceFault = 507015;
constexpr int kOperatorFailed = 561103;

void synchronize_current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl npu(kNpu);
  npu.synchronizeStream(npu.getStream(device));
}

// The call's share of a replay: 0, or the code of an error.
int compute_again(const Call& call, const Outputs& outputs) {
  if (const std::string words = call.missing_operand(); !words.empty()) {
    aclsim_report_fault(words);
    return kDeviceFault;
  }
  try {
    Call::store(call.compute(), outputs);
    return 0;
  } catch (const std::exception& error) {
    aclsim_report_error(call.name() + ": " + error.what());
    return kOperatorFailed;
  }
}

// Computes as well, since only the CPU kernel knows the shapes of its results.
Outputs capture(Call call, void* stream) {
  TORCH_CHECK(aclsim_capture(stream) == kAclsimCapturing, call.name(), ": an update of a task group is not simulated");
  for (const Operand& operand : call.operands()) {
    if (operand.written) aclsim_save(stream, const_cast<void*>(operand.first), operand.bytes);
  }
  const Stack results = call.compute();
  Outputs outputs = call.make_outputs(results);
  call.detach(outputs);
  for (const auto& [index, place] : outputs.new_tensors) aclsim_save(stream, place.data_ptr(), place.nbytes());
  Call::store(results, outputs);
  Outputs places{{}, outputs.new_tensors, {}};
  aclsim_enqueue(stream, [call = std::move(call), places = std::move(places)] { return compute_again(call, places); });
  return outputs;
}

Outputs run(const Call& call) {
  synchronize_current_stream(call.device());
  const Stack results = call.compute();
  Outputs outputs = call.make_outputs(results);
  if (!outputs.resized.empty()) synchronize_current_stream(call.device());  // a resize copies, maybe later
  Call::store(results, outputs);
  return outputs;
}

void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const std::size_t count = op.schema().arguments().size();
  Call call(op, torch::jit::last(*stack, count));
  const c10::DeviceGuard guard(call.device());
  // What torch_npu has queued for the stream comes before.
  void* const on = c10_npu::getCurrentNPUStream(call.device().index()).stream(true);
  Outputs outputs = aclsim_capture(on) != 0 ? capture(std::move(call), on) : run(call);
  torch::jit::drop(*stack, count);
  for (c10::IValue& value : outputs.values) stack->push_back(std::move(value));
}

void compose(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  op.redispatchBoxed(c10::DispatchKeySet(kComposition), stack);
}

// As torch does it for CPU tensors.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
                     bool grouped) {
  const auto choice = at::_fused_sdp_choice(query, key, value, mask, dropout, causal, scale, grouped);
  std::optional<at::Tensor> added = mask;
  if (mask && mask->scalar_type() == at::kBool) {
    added = at::zeros(mask->sizes(), query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  const bool differentiable_mask = mask && mask->requires_grad();
  if (choice == kFlashAttention && !differentiable_mask) {
    const auto made =
        at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, added, scale);
    return std::get<0>(made);
  }
  const auto made = at::_scaled_dot_product_attention_math(query, key, value, added, dropout, causal, std::nullopt,
                                                           scale, grouped);
  return std::get<0>(made);
}

// To take operators over is the purpose here, so torch's one warning of it is dropped; other warnings pass.
class Quiet : public c10::WarningHandler {
 public:
  Quiet() : guard_(this) {}
  void process(const c10::Warning& warning) override {
    if (warning.msg().find("Overriding a previously registered kernel") == std::string::npos) other_->process(warning);
  }

 private:
  c10::WarningHandler* other_ = c10::WarningUtils::get_warning_handler();
  c10::WarningUtils::WarningHandlerGuard guard_;
};

// Never destroyed: the process may end while operators still run.
torch::Library& library(c10::DispatchKey key) {
  return *new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
}

c10::OperatorHandle find(const std::string& name) {
  const std::size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.substr(0, dot).c_str(), overload.c_str());
}

void register_cpu_kernels(const std::vector<std::string>& names) {
  const Quiet quiet;
  auto& npu = library(kNpuKey);
  for (const std::string& name : names) {
    TORCH_CHECK(find(name).hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), name, " has no CPU kernel");
    npu.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
  }
}

void register_compositions(const std::vector<std::string>& names) {
  const Quiet quiet;
  for (torch::Library* const made : {&library(kNpuKey), &library(kAutogradNpuKey)}) {
    made->impl("scaled_dot_product_attention", &attention);
    for (const std::string& name : names) {
      made->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&compose>());
    }
  }
}

bool makes_view(const c10::OperatorHandle& op) {
  const auto is_view = [](const c10::Argument& one) { return one.alias_info() && !one.alias_info()->isWrite(); };
  const auto& returns = op.schema().returns();
  return op.hasTag(at::Tag::inplace_view) || std::any_of(returns.begin(), returns.end(), is_view);
}

// The aten operators with a kernel registered for a dispatch key, but for those that make views.
std::vector<std::string> registered(const std::string& key) {
  auto& dispatcher = c10::Dispatcher::singleton();
  std::vector<std::string> names;
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(c10::parseDispatchKey(key))) {
    const auto declared = dispatcher.findSchema(name);
    const bool is_aten = name.name.rfind("aten::", 0) == 0;
    if (is_aten && declared && !makes_view(*declared)) names.push_back(toString(name));
  }
  return names;
}

}  // namespace
}  // namespace torch_operators

PYBIND11_MODULE(torch_operators, module) {
  module.def("registered", &torch_operators::registered);
  module.def("register_cpu_kernels", &torch_operators::register_cpu_kernels);
  module.def("register_compositions", &torch_operators::register_compositions);
}
