#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <mutex>
#include <sstream>

#include "control.h"
#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"
#include "torch_operators.h"

namespace torch_operators {
namespace {

bool on_npu(const at::Tensor& tensor) { return tensor.device().type() == kNpu; }

// A CPU tensor over the NPU tensor's memory, which it does not own.
at::Tensor over(const at::Tensor& npu, c10::Storage storage) {
  auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       npu.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(npu.sizes(), npu.strides(), npu.storage_offset());
  if (npu.is_conj()) host._set_conj(true);
  if (npu.is_neg()) host._set_neg(true);
  return host;
}

c10::Storage over(const c10::Storage& npu) {
  return {c10::Storage::use_byte_size_t(), npu.nbytes(), c10::DataPtr(npu.mutable_data(), c10::Device(c10::kCPU)),
          c10::GetCPUAllocator(), true};
}

at::Tensor over(const at::Tensor& npu) { return over(npu, over(npu.storage())); }

// Bytes from a tensor's first element to its last.
std::size_t span(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return static_cast<std::size_t>(last + 1) * tensor.itemsize();
}

std::string described(const std::string& name, const at::Tensor& tensor) {
  std::ostringstream words;
  words << "argument '" << name << "' (" << c10::getDtypeNames(tensor.scalar_type()).first << ' ' << tensor.sizes()
        << ')';
  return words.str();
}

// Spreads (seed, offset) over all seeds, so that neighbours share no numbers (the finalizer of MurmurHash3).
std::uint64_t mixed(std::uint64_t seed, std::uint64_t offset) {
  std::uint64_t bits = seed * 0x9E3779B97F4A7C15 + offset;
  bits = (bits ^ (bits >> 33)) * 0xFF51AFD7ED558CCD;
  bits = (bits ^ (bits >> 33)) * 0xC4CEB9FE1A85EC53;
  return bits ^ (bits >> 33);
}

// For kernels that take no generator: those draw from the CPU's default one, which must not notice.
class DefaultGenerator {
 public:
  explicit DefaultGenerator(std::uint64_t seed) : lock_(mutex()), own_(at::detail::getDefaultCPUGenerator()) {
    const std::lock_guard<std::mutex> guard(own_.mutex());
    before_ = own_.clone();
    own_.set_current_seed(seed);
  }
  ~DefaultGenerator() {
    const std::lock_guard<std::mutex> guard(own_.mutex());
    own_.set_state(before_.get_state());
  }
  DefaultGenerator(const DefaultGenerator&) = delete;
  DefaultGenerator& operator=(const DefaultGenerator&) = delete;

 private:
  static std::mutex& mutex() {
    static auto* const made = new std::mutex;
    return *made;
  }
  std::lock_guard<std::mutex> lock_;
  at::Generator own_;
  at::Generator before_;
};

bool is_generator(const c10::Argument& argument) {
  const auto type = argument.type();
  const auto optional = type->cast<c10::OptionalType>();
  return (optional ? optional->getElementType() : type)->kind() == c10::TypeKind::GeneratorType;
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

}  // namespace

Call::Call(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) : op_(op) {
  const auto& declared = op.schema().arguments();
  for (std::size_t i = 0; i < declared.size(); ++i) {
    if (is_generator(declared[i])) generator_ = i;
    inputs_.push_back(convert(declared[i], arguments[i]));
  }
  if (!device_) device_ = c10::impl::VirtualGuardImpl(kNpu).getDevice();
  if (generator_ && arguments[*generator_].isGenerator()) {
    seed_from(arguments[*generator_].toGenerator());
  } else if (generator_ || op.hasTag(at::Tag::nondeterministic_seeded)) {
    seed_from(at_npu::detail::getDefaultNPUGenerator(device_->index()));
  }
}

std::string Call::name() const { return toString(op_.operator_name()); }

c10::IValue Call::convert(const c10::Argument& argument, const c10::IValue& value) {
  const bool written = is_written(argument);
  if (value.isTensor()) return convert_tensor(argument.name(), written, value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> list;
    for (const at::Tensor& one : value.toTensorVector()) {
      const std::string name = argument.name() + '[' + std::to_string(list.size()) + ']';
      list.push_back(convert_tensor(name, written, one));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor> one : value.toOptionalTensorList()) {
      const std::string name = argument.name() + '[' + std::to_string(list.size()) + ']';
      list.push_back(one ? std::optional(convert_tensor(name, written, *one)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kNpu) {
    const c10::Device device = value.toDevice();
    note_device(argument.name(), device.has_index() ? device : c10::impl::VirtualGuardImpl(kNpu).getDevice());
    return c10::Device(c10::kCPU);
  }
  return value;
}

at::Tensor Call::convert_tensor(const std::string& name, bool written, const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (!on_npu(tensor)) {
    refuse_other_device(name, tensor);
    return tensor;
  }
  TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), this->name(),
              ": the simulated NPU reads strided tensors only, and ", name, " is not one");
  note_device(name, tensor.device());
  const auto same = [&tensor](const Alias& alias) { return alias.npu.is_same(tensor); };
  const auto known = std::find_if(aliases_.begin(), aliases_.end(), same);
  if (known != aliases_.end()) return known->host;
  note_operand(name, written, tensor);
  // Views of one storage stay that, so that the CPU kernel finds operands that overlap.
  const auto shared = [&tensor](const Alias& alias) { return alias.npu.storage().is_alias_of(tensor.storage()); };
  const auto view = std::find_if(aliases_.begin(), aliases_.end(), shared);
  aliases_.push_back({tensor, view == aliases_.end() ? over(tensor) : over(tensor, view->host.storage())});
  return aliases_.back().host;
}

// As on other devices: a number in a CPU tensor without dimensions, and indices that lie on the host, may be mixed in.
void Call::refuse_other_device(const std::string& name, const at::Tensor& tensor) const {
  const bool is_index = name.rfind("indices[", 0) == 0;
  TORCH_CHECK(tensor.is_cpu() && (tensor.dim() == 0 || is_index), "Expected all tensors to be on the same device, but ",
              described(name, tensor), " of ", this->name(), " is on ", tensor.device(), " and not on an NPU");
}

void Call::note_device(const std::string& name, c10::Device device) {
  TORCH_CHECK(!device_ || *device_ == device, "Expected all tensors to be on the same device, but found at least two, ",
              *device_, " and ", device, " (argument '", name, "' of ", this->name(), ')');
  device_ = device;
}

void Call::note_operand(const std::string& name, bool written, const at::Tensor& tensor) {
  const auto bytes = span(tensor);
  if (bytes > 0) {
    const auto* const first = static_cast<const char*>(tensor.storage().data());
    const auto offset = static_cast<std::size_t>(tensor.storage_offset()) * tensor.itemsize();
    operands_.push_back({described(name, tensor), first + offset, bytes, written});
  } else if (written && tensor.storage().nbytes() > 0) {  // the kernel may grow it to the whole storage
    operands_.push_back({described(name, tensor), tensor.storage().data(), tensor.storage().nbytes(), written});
  }
}

// Seed and offset are the whole state of an NPU's generator; each use moves the offset on.
void Call::seed_from(at::Generator generator) {
  TORCH_CHECK(generator.device().type() == kNpu, name(), ": expected a generator of an NPU, found one of ",
              generator.device());
  const std::lock_guard<std::mutex> guard(generator.mutex());
  const std::uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);
  seed_ = mixed(generator.current_seed(), offset);
}

std::string Call::missing_operand() const {
  for (const Operand& operand : operands_) {
    const int found = aclsim_probe(operand.first, operand.bytes);
    if (found == 1) continue;
    std::ostringstream words;
    words << name() << ": " << operand.words << ": no device memory at " << operand.first << " (" << operand.bytes
          << " bytes): " << (found == 0 ? "it sleeps or is not mapped" : "it was freed, or never was device memory");
    return words.str();
  }
  return "";
}

Stack Call::inputs() const {
  Stack stack(inputs_);
  if (seed_ && generator_) stack[*generator_] = at::make_generator<at::CPUGeneratorImpl>(*seed_);
  return stack;
}

Stack Call::compute() const {
  if (const std::string words = missing_operand(); !words.empty()) {
    aclsim_report_fault(words);
    TORCH_CHECK(false, words);
  }
  const c10::NoGradGuard no_grad;
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::optional<DefaultGenerator> generator;
  if (seed_ && !generator_) generator.emplace(*seed_);
  Stack stack = inputs();
  op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

Outputs Call::make_outputs(const Stack& results) const {
  Outputs outputs;
  for (const auto& [npu, host] : aliases_) {
    if (host.sizes() == npu.sizes() && host.storage().data() == npu.storage().data()) continue;
    npu.resize_(host.sizes());
    if (npu.strides() != host.strides()) npu.as_strided_(host.sizes(), host.strides());
    if (host.storage().data() != npu.storage().data()) outputs.resized.emplace_back(host, over(npu));
  }
  std::size_t index = 0;
  for (const c10::IValue& result : results) outputs.values.push_back(output(result, &index, &outputs));
  return outputs;
}

c10::IValue Call::output(const c10::IValue& result, std::size_t* index, Outputs* outputs) const {
  if (result.isTensor()) return output_tensor(result.toTensor(), (*index)++, outputs);
  if (!result.isTensorList()) return result;
  std::vector<at::Tensor> list;
  for (const at::Tensor& one : result.toTensorVector()) list.push_back(output_tensor(one, (*index)++, outputs));
  return list;
}

at::Tensor Call::output_tensor(const at::Tensor& result, std::size_t index, Outputs* outputs) const {
  if (!result.defined()) return result;
  for (const auto& [npu, host] : aliases_) {
    if (host.is_same(result)) return npu;
  }
  const auto options = result.options().device(device());
  const at::Tensor made = result.is_non_overlapping_and_dense()
                              ? at::empty_strided(result.sizes(), result.strides(), options)
                              : at::empty(result.sizes(), options);
  if (result.numel() > 0) outputs->new_tensors.emplace_back(index, over(made));
  return made;
}

void Call::store(const Stack& results, const Outputs& outputs) {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& result : results) {
    if (result.isTensor()) tensors.push_back(result.toTensor());
    if (!result.isTensorList()) continue;
    for (const at::Tensor& one : result.toTensorVector()) tensors.push_back(one);
  }
  for (const auto& [index, place] : outputs.new_tensors) place.copy_(tensors[index]);
  for (const auto& [host, place] : outputs.resized) place.copy_(host);
}

void Call::detach(const Outputs& outputs) {
  TORCH_CHECK(outputs.resized.empty(), name(), ": a result that grows in a captured graph is not simulated");
  for (const auto& [index, place] : outputs.new_tensors) {
    operands_.push_back({described("result " + std::to_string(index), place), place.data_ptr(), span(place), true});
  }
  aliases_.clear();
}

}  // namespace torch_operators
