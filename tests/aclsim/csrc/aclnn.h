// How an operator written as a C++ function on at::Tensor becomes the pair of C functions that torch_npu looks up:
// aclnnX and aclnnXGetWorkspaceSize. The torch_npu wheel has no aclnn headers: the order of arguments is that of its
// own calls.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "acl/acl.h"

// Where an operand lies in device memory, to check before the operator runs.
struct Operand {
  const void* address;
  std::size_t bytes;
};

struct aclTensor {
  at::Tensor value;
  Operand operand;
};

struct aclScalar {
  at::Scalar value;
};

struct aclIntArray {
  std::vector<int64_t> value;
};

struct aclFloatArray {
  std::vector<float> value;
};

struct aclBoolArray {
  std::vector<bool> value;
};

struct aclTensorList {
  std::vector<at::Tensor> value;
  std::vector<aclTensor> operands;
};

struct aclScalarList {
  std::vector<at::Scalar> value;
};

struct aclOpExecutor {
  const char* name;
  std::function<void()> action;
  std::vector<aclTensor> operands;
};

namespace aclnn {

at::ScalarType scalar_type(int type);
// 0, or the code of a device fault: an operand has no memory behind it.
int check_operands(const aclOpExecutor& executor);
// Queues the operator on a stream. Operands are checked again when it runs.
int launch(aclOpExecutor* executor, void* stream);
int refuse(const char* name, const char* words);

// The C type of a parameter, its value, and the device memory it names.
template <typename Value>
struct Parameter {
  using Type = Value;
  static Value value(Type argument) { return argument; }
  static void note(Type, aclOpExecutor*) {}
};

template <>
struct Parameter<at::Tensor> {
  using Type = const aclTensor*;
  static at::Tensor value(Type argument) { return argument->value; }
  static void note(Type argument, aclOpExecutor* executor) {
    if (argument != nullptr && argument->operand.address != nullptr) executor->operands.push_back(*argument);
  }
};

template <>
struct Parameter<at::Scalar> {
  using Type = const aclScalar*;
  static at::Scalar value(Type argument) { return argument == nullptr ? at::Scalar() : argument->value; }
  static void note(Type, aclOpExecutor*) {}
};

template <>
struct Parameter<std::vector<int64_t>> {
  using Type = const aclIntArray*;
  static std::vector<int64_t> value(Type argument) {
    return argument == nullptr ? std::vector<int64_t>() : argument->value;
  }
  static void note(Type, aclOpExecutor*) {}
};

template <>
struct Parameter<std::vector<at::Tensor>> {
  using Type = const aclTensorList*;
  static std::vector<at::Tensor> value(Type argument) { return argument->value; }
  static void note(Type argument, aclOpExecutor* executor) {
    executor->operands.insert(executor->operands.end(), argument->operands.begin(), argument->operands.end());
  }
};

template <typename Function>
struct Operator;

template <typename... Values>
struct Operator<void (*)(Values...)> {
  template <void (*function)(Values...), const char* const* name>
  static int workspace_size(typename Parameter<Values>::Type... arguments, uint64_t* bytes,
                            aclOpExecutor** executor) {
    try {
      auto made = std::make_unique<aclOpExecutor>(aclOpExecutor{*name, {}, {}});
      (Parameter<Values>::note(arguments, made.get()), ...);
      if (const int error = check_operands(*made)) return error;
      made->action = [values = std::make_tuple(Parameter<Values>::value(arguments)...)] {
        std::apply(function, values);
      };
      *bytes = 0;
      *executor = made.release();
      return 0;
    } catch (const std::exception& error) {
      return refuse(*name, error.what());
    }
  }
};

}  // namespace aclnn

// The C signature of GetWorkspaceSize follows from the operator's, so it is exported as an alias of a template's
// instance, which only an ifunc can be.
#define ACLNN(name, parameters, ...)                                                                       \
  static void name##_action parameters { __VA_ARGS__; }                                                    \
  static const char* const name##_name = #name;                                                            \
  extern "C" __attribute__((visibility("hidden"))) void (*name##_resolve())() {                            \
    return (void (*)()) & aclnn::Operator<decltype(&name##_action)>::workspace_size<&name##_action, &name##_name>; \
  }                                                                                                        \
  extern "C" void name##GetWorkspaceSize() __attribute__((ifunc(#name "_resolve")));                       \
  extern "C" int name(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {                      \
    return aclnn::launch(executor, stream);                                                                \
  }
