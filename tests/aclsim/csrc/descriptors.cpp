// Tensor descriptors and attributes of the older operator interface. torch_npu links to them; the interface itself
// (op_compiler.cpp) runs nothing.
#include <string>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

struct aclDataBuffer {
  void* address;
  size_t bytes;
};

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> sizes;
  std::string name;
};

struct aclopAttr {
  int unused;
};

extern "C" {

aclDataBuffer* aclCreateDataBuffer(void* address, size_t bytes) { return new aclDataBuffer{address, bytes}; }

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return 0;
}

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* sizes, aclFormat format) {
  return new aclTensorDesc{type, format, {sizes, sizes + count}, {}};
}

void aclDestroyTensorDesc(const aclTensorDesc* tensor) { delete tensor; }

aclError aclGetTensorDescDimV2(const aclTensorDesc* tensor, size_t index, int64_t* size) {
  if (index >= tensor->sizes.size()) return ACL_ERROR_INVALID_PARAM;
  *size = tensor->sizes[index];
  return 0;
}

aclFormat aclGetTensorDescFormat(const aclTensorDesc* tensor) { return tensor->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* tensor) { return tensor->sizes.size(); }
aclDataType aclGetTensorDescType(const aclTensorDesc* tensor) { return tensor->type; }
void aclSetTensorDescName(aclTensorDesc* tensor, const char* name) { tensor->name = name == nullptr ? "" : name; }
aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return 0; }
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return 0; }
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return 0; }

aclopAttr* aclopCreateAttr() { return new aclopAttr{}; }
void aclopDestroyAttr(const aclopAttr* attribute) { delete attribute; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return 0; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return 0; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return 0; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return 0; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return 0; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return 0; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return 0; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) { return 0; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return 0; }

}  // extern "C"
