#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/Generator.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
std::map<std::string, long> calls;
bool trace = std::getenv("ACLSIM_TRACE_OPS") != nullptr;

bool on_npu(const at::Tensor& t) { return t.defined() && t.device().type() == kNpu; }

void wait() {
  const c10::impl::VirtualGuardImpl guard(kNpu);
  guard.synchronizeStream(guard.getStream(guard.getDevice()));
}

// One conversion of a call's arguments; an NPU tensor met twice becomes the same CPU tensor.
struct Aliases {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // NPU, CPU
  at::Tensor cpu(const at::Tensor& t) {
    if (!on_npu(t)) return t;
    for (auto& [npu, host] : pairs)
      if (npu.is_same(t)) return host;
    const auto& storage = t.storage();
    c10::Storage own(c10::Storage::use_byte_size_t(), storage.nbytes(),
                     c10::DataPtr(storage.mutable_data(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true);
    auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(own), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) host._set_conj(true);
    if (t.is_neg()) host._set_neg(true);
    pairs.emplace_back(t, host);
    return host;
  }
  at::Tensor npu(const at::Tensor& t, c10::Device device) {
    if (!t.defined()) return t;
    for (auto& [npu, host] : pairs)
      if (host.is_same(t)) return npu;
    const at::Tensor source = t.is_non_overlapping_and_dense() ? t : t.contiguous();
    at::Tensor made = at::empty_strided(source.sizes(), source.strides(), source.options().device(device));
    if (source.numel() > 0) std::memcpy(made.data_ptr(), source.data_ptr(), source.nbytes());
    return made;
  }
  // Outputs that the operator resized.
  void write_back() {
    for (auto& [npu, host] : pairs) {
      if (host.sizes() == npu.sizes() && host.storage().data() == npu.storage().data()) continue;
      npu.resize_(host.sizes());
      const at::Tensor source = host.contiguous();
      if (source.numel() > 0) std::memcpy(npu.data_ptr(), source.data_ptr(), source.nbytes());
    }
  }
};

at::Generator host_generator(const at::Generator& npu) {
  // Seed and offset of the NPU's generator are its whole state; each use moves the offset on.
  at::Generator own = npu;
  const uint64_t offset = own.get_offset();
  own.set_offset(offset + 4096);
  return at::make_generator<at::CPUGeneratorImpl>(own.current_seed() * 1000003 + offset);
}

void boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  if (trace) std::fprintf(stderr, "[fallback] %s.%s\n", schema.name().c_str(), schema.overload_name().c_str());
  ++calls[schema.name() + "." + schema.overload_name()];
  wait();
  const size_t count = schema.arguments().size();
  auto arguments = torch::jit::last(*stack, count);
  Aliases aliases;
  c10::Device device(kNpu, c10::impl::VirtualGuardImpl(kNpu).getDevice().index());
  const auto see = [&](const at::Tensor& t) {
    if (on_npu(t)) device = t.device();
    return aliases.cpu(t);
  };
  std::vector<c10::IValue> inputs;
  for (const c10::IValue& value : arguments) {
    if (value.isTensor()) inputs.emplace_back(see(value.toTensor()));
    else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(see(t));
      inputs.emplace_back(std::move(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor> t : value.toOptionalTensorList()) list.push_back(t ? std::optional<at::Tensor>(see(*t)) : t);
      inputs.emplace_back(std::move(list));
    } else if (value.isDevice() && value.toDevice().type() == kNpu) {
      device = value.toDevice();
      inputs.emplace_back(c10::Device(c10::kCPU));
    } else if (value.isGenerator() && value.toGenerator().device().type() == kNpu) {
      inputs.emplace_back(host_generator(value.toGenerator()));
    } else inputs.push_back(value);
  }
  torch::jit::drop(*stack, count);
  torch::jit::Stack own(inputs.begin(), inputs.end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &own);
  for (c10::IValue& value : own) {
    if (value.isTensor()) stack->emplace_back(aliases.npu(value.toTensor(), device));
    else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(aliases.npu(t, device));
      stack->emplace_back(std::move(list));
    } else stack->push_back(value);
  }
  aliases.write_back();
}

std::vector<std::unique_ptr<torch::Library>> registrations;

// Overrides what torch_npu registered for these operators ("aten::add.Tensor"); returns those that have no CPU kernel.
std::vector<std::string> take(const std::vector<std::string>& names) {
  std::vector<std::string> without;
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const std::string& name : names) {
    const size_t dot = name.find('.');
    const auto op = c10::Dispatcher::singleton().findOp({name.substr(0, dot), dot == std::string::npos ? "" : name.substr(dot + 1)});
    if (!op || !(op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU))) {
      without.push_back(name);
      continue;
    }
    library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&boxed>());
  }
  registrations.push_back(std::move(library));
  return without;
}

// Every operator of a namespace with a kernel for `key`.
std::vector<std::string> having(const std::string& prefix, const std::string& key) {
  std::vector<std::string> names;
  const auto wanted = c10::parseDispatchKey(key);
  for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(wanted))
    if (name.name.rfind(prefix, 0) == 0) names.push_back(name.overload_name.empty() ? name.name : name.name + "." + name.overload_name);
  return names;
}

}  // namespace

PYBIND11_MODULE(torch_operators, module) {
  module.def("take", &take);
  module.def("having", &having);
  module.def("calls", [] { return calls; });
}
