// libatb.so: Ascend Transformer Boost. Nothing of it is simulated: torch_npu's operators that are made of it have
// references in Python, and whoever gets here is told which operation has none.
#include <cstdint>
#include <cstdio>

#include "control.h"

namespace atb {

class Context;
class Operation;
struct Tensor;

namespace infer {
struct ElewiseParam;
struct GroupTopkParam;
struct LinearParam;
struct PagedAttentionParam;
struct ReshapeAndCacheParam;
struct RmsNormParam;
struct RopeParam;
struct SelfAttentionParam;
}  // namespace infer

namespace {

constexpr int kRefused = 1;

int refuse(const char* what) {
  std::fprintf(stderr, "[aclsim] ATB's %s is not simulated: add a reference to tests/aclsim/python/simulated_npu\n", what);
  aclsim_count_error();
  return kRefused;
}

}  // namespace

// As ATB declares them, so that they have the same names in the library.
template <typename Parameters>
int CreateOperation(const Parameters& parameters, Operation** operation);
int CreateContext(Context** context);
int DestroyContext(Context* context);
int DestroyOperation(Operation* operation);

#define ATB_OPERATION(name)                                                            \
  template <>                                                                          \
  int CreateOperation<infer::name##Param>(const infer::name##Param&, Operation** operation) { \
    *operation = nullptr;                                                              \
    return refuse(#name);                                                              \
  }
ATB_OPERATION(Elewise)
ATB_OPERATION(GroupTopk)
ATB_OPERATION(Linear)
ATB_OPERATION(PagedAttention)
ATB_OPERATION(ReshapeAndCache)
ATB_OPERATION(RmsNorm)
ATB_OPERATION(Rope)
ATB_OPERATION(SelfAttention)

int CreateContext(Context** context) {
  *context = nullptr;
  return refuse("context");
}

// Of what was never made.
int DestroyContext(Context*) { return 0; }
int DestroyOperation(Operation*) { return 0; }

class Utils {
 public:
  static uint64_t GetTensorSize(const Tensor& tensor);
};

// Asked of the operands of an operation before it is made, which fails.
uint64_t Utils::GetTensorSize(const Tensor&) { return 0; }

}  // namespace atb
