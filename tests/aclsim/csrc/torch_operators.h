// One call of a torch operator on NPU tensors, computed by the operator's CPU kernel over the tensors' own addresses.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace torch_operators {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
using Stack = torch::jit::Stack;

// Device memory that a call may touch.
struct Operand {
  std::string words;  // "argument 'self' (float32 [2, 3])"
  const void* first;
  std::size_t bytes;
  bool written;
};

// What a call returns to torch, and where its results are to be written: CPU tensors over device addresses. They own
// nothing, as the work of a stream does not.
struct Outputs {
  Stack values;
  std::vector<std::pair<std::size_t, at::Tensor>> new_tensors;        // which of the results, to where
  std::vector<std::pair<at::Tensor, at::Tensor>> resized;  // an operand of the CPU kernel, to where
};

class Call {
 public:
  // Throws where operands are on several devices, or not of a kind that the CPU kernel reads.
  Call(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments);

  c10::Device device() const { return *device_; }

  // Checks the operands and runs the CPU kernel, each time with the same random numbers: what was changed in place is
  // changed when this returns, and the rest is in the results. Throws where an operand has no memory behind it.
  Stack compute() const;

  // Allocates NPU tensors for the results, and resizes the operands that the kernel has resized.
  Outputs make_outputs(const Stack& results) const;

  static void store(const Stack& results, const Outputs& outputs);

  // "" or words for the operand that has no memory behind it.
  std::string missing_operand() const;

  // For a call that is computed again when its tensors may be gone: drops them, and counts the results' memory as
  // operands. Throws where that could not give the right results.
  void detach(const Outputs& outputs);

  const std::vector<Operand>& operands() const { return operands_; }
  std::string name() const;

 private:
  struct Alias {
    at::Tensor npu;
    at::Tensor host;
  };

  c10::IValue convert(const c10::Argument& argument, const c10::IValue& value);
  at::Tensor convert_tensor(const std::string& name, bool written, const at::Tensor& tensor);
  void refuse_other_device(const std::string& name, const at::Tensor& tensor) const;
  void note_device(const std::string& name, c10::Device device);
  void note_operand(const std::string& name, bool written, const at::Tensor& tensor);
  void seed_from(at::Generator generator);
  Stack inputs() const;
  c10::IValue output(const c10::IValue& result, std::size_t* index, Outputs* outputs) const;
  at::Tensor output_tensor(const at::Tensor& result, std::size_t index, Outputs* outputs) const;

  c10::OperatorHandle op_;
  std::optional<c10::Device> device_;
  std::vector<c10::IValue> inputs_;
  std::vector<Alias> aliases_;
  std::vector<Operand> operands_;
  std::optional<std::uint64_t> seed_;
  std::optional<std::size_t> generator_;  // which of the inputs
};

}  // namespace torch_operators
