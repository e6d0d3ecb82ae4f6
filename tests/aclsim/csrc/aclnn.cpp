// libopapi.so: what operators are made of. Device memory is host memory, so an aclTensor is a CPU tensor over it.
#include "aclnn.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include "control.h"

namespace aclnn {
namespace {

constexpr int kDeviceFault = 507015;
constexpr int kOperatorFailed = 561103;

struct TypePair {
  int acl;
  at::ScalarType torch;
};

constexpr TypePair kTypes[] = {
    {ACL_FLOAT, at::kFloat},     {ACL_FLOAT16, at::kHalf},   {ACL_BF16, at::kBFloat16},
    {ACL_DOUBLE, at::kDouble},   {ACL_INT8, at::kChar},      {ACL_UINT8, at::kByte},
    {ACL_INT16, at::kShort},     {ACL_INT32, at::kInt},      {ACL_INT64, at::kLong},
    {ACL_BOOL, at::kBool},       {ACL_UINT16, at::kUInt16},  {ACL_UINT32, at::kUInt32},
    {ACL_UINT64, at::kUInt64},   {ACL_COMPLEX64, at::kComplexFloat},
};

bool is_backed(const aclTensor& tensor) { return aclsim_probe(tensor.operand.address, tensor.operand.bytes) == 1; }

int run(const aclOpExecutor& executor) {
  if (const int error = check_operands(executor)) return error;
  try {
    const c10::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below;
    executor.action();
    return 0;
  } catch (const std::exception& error) {
    return refuse(executor.name, error.what());
  }
}

// Elements from the first to the last of a strided tensor; 0 when it has none.
std::size_t extent(at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return 0;
  int64_t last = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return static_cast<std::size_t>(last + 1);
}

}  // namespace

at::ScalarType scalar_type(int type) {
  const auto same = [type](const TypePair& pair) { return pair.acl == type; };
  const auto* const found = std::find_if(std::begin(kTypes), std::end(kTypes), same);
  if (found == std::end(kTypes)) throw std::runtime_error("aclDataType " + std::to_string(type));
  return found->torch;
}

int refuse(const char* name, const char* words) {
  aclsim_report_error(std::string(name) + ": " + words);
  return kOperatorFailed;
}

int check_operands(const aclOpExecutor& executor) {
  const auto& operands = executor.operands;
  const auto found = std::find_if_not(operands.begin(), operands.end(), is_backed);
  if (found == operands.end()) return 0;
  std::ostringstream words;
  words << executor.name << ": its tensor " << found - operands.begin() + 1 << " of " << operands.size() << " ("
        << c10::getDtypeNames(found->value.scalar_type()).first << ' ' << found->value.sizes()
        << ") has no device memory behind it at " << found->operand.address << " (" << found->operand.bytes
        << " bytes): it sleeps, is not mapped, or was freed";
  aclsim_report_fault(words.str());
  return kDeviceFault;
}

int launch(aclOpExecutor* executor, void* stream) {
  const auto owned = std::shared_ptr<aclOpExecutor>(executor);
  // Which of its tensors an operator writes, it does not say.
  std::vector<aclsim_range> writes;
  for (const aclTensor& one : owned->operands) {
    writes.push_back({const_cast<void*>(one.operand.address), one.operand.bytes});
  }
  const int error = aclsim_enqueue(stream, [owned] { return run(*owned); }, writes);
  if (error == 0) return 0;
  // torch_npu would raise once, and from then on drop each operator without a word.
  const char* const words = aclGetRecentErrMsg();
  std::fprintf(stderr, "[aclsim] %s\n", words == nullptr ? owned->name : words);
  std::abort();
}

}  // namespace aclnn

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t count, aclDataType type, const int64_t* strides,
                           int64_t offset, aclFormat, const int64_t*, uint64_t, void* address) {
  const at::ScalarType torch_type = aclnn::scalar_type(type);
  const at::IntArrayRef shape(sizes, count);
  const at::IntArrayRef steps(strides, count);
  const std::size_t width = c10::elementSize(torch_type);
  const std::size_t elements = address == nullptr ? 0 : aclnn::extent(shape, steps);
  if (elements == 0) return new aclTensor{at::empty(shape, torch_type), {nullptr, 0}};
  char* const first = static_cast<char*>(address) + offset * static_cast<int64_t>(width);
  return new aclTensor{at::from_blob(first, shape, steps, torch_type), {first, elements * width}};
}

aclScalar* aclCreateScalar(void* value, aclDataType type) {
  const at::Tensor scalar = at::from_blob(value, {}, aclnn::scalar_type(type));
  return new aclScalar{scalar.item()};
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new aclIntArray{{values, values + count}};
}

aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) {
  return new aclFloatArray{{values, values + count}};
}

aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) {
  return new aclBoolArray{std::vector<bool>(values, values + count)};
}

// Lists take over what they hold.
aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
  auto* const list = new aclTensorList;
  for (uint64_t i = 0; i < count; ++i) {
    const std::unique_ptr<const aclTensor> tensor(tensors[i]);
    list->value.push_back(tensor == nullptr ? at::Tensor() : tensor->value);
    if (tensor != nullptr && tensor->operand.address != nullptr) list->operands.push_back(*tensor);
  }
  return list;
}

aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
  auto* const list = new aclScalarList;
  for (uint64_t i = 0; i < count; ++i) {
    list->value.push_back(scalars[i]->value);
    delete scalars[i];
  }
  return list;
}

#define ACLNN_DESTROY(type)              \
  int aclDestroy##type(const acl##type* value) { \
    delete value;                        \
    return 0;                            \
  }
ACLNN_DESTROY(Tensor)
ACLNN_DESTROY(Scalar)
ACLNN_DESTROY(IntArray)
ACLNN_DESTROY(FloatArray)
ACLNN_DESTROY(BoolArray)
ACLNN_DESTROY(TensorList)
ACLNN_DESTROY(ScalarList)

int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete executor;
  return 0;
}

}  // extern "C"
