// The operators, each computed by torch's CPU kernel. A new one is a line: its name, its parameters in the order of
// torch_npu's call, and what it does. Random numbers are not those of real hardware.
#include <ATen/CPUGeneratorImpl.h>

#include "aclnn.h"
#include "control.h"

using Tensor = at::Tensor;
using Scalar = at::Scalar;
using Sizes = std::vector<int64_t>;
using Tensors = std::vector<at::Tensor>;

namespace {

at::Generator generator(uint64_t seed, uint64_t offset) {
  return at::make_generator<at::CPUGeneratorImpl>(seed * 1000003 + offset);
}

Tensor index(const Tensor& from, const Tensors& indices) {
  c10::List<std::optional<Tensor>> list;
  for (const Tensor& one : indices) {
    const bool given = one.defined() && one.numel() > 0;
    list.push_back(given ? std::optional<Tensor>(one) : std::nullopt);
  }
  return at::index(from, list);
}

Tensor sum(const Tensor& from, const Sizes& dims, bool keep, int type) {
  return at::sum(from, dims, keep, aclnn::scalar_type(type));
}

Tensor mean(const Tensor& from, const Sizes& dims, bool keep, int type) {
  return at::mean(from, dims, keep, aclnn::scalar_type(type));
}

void clear(const Tensor& a) {
  if (a.is_non_overlapping_and_dense()) {
    aclsim_clear(a.mutable_data_ptr(), a.nbytes());
  } else {
    a.zero_();
  }
}

}  // namespace

// ---- data movement -----------------------------------------------
ACLNN(aclnnInplaceCopy, (Tensor d, Tensor s), d.copy_(s))
ACLNN(aclnnCast, (Tensor a, int, Tensor o), o.copy_(a))
ACLNN(aclnnInplaceZero, (Tensor a), clear(a))
ACLNN(aclnnInplaceOne, (Tensor a), a.fill_(1))
ACLNN(aclnnInplaceFillScalar, (Tensor a, Scalar v), a.fill_(v))
ACLNN(aclnnInplaceFillTensor, (Tensor a, Tensor v), a.fill_(v.reshape({})))
ACLNN(aclnnArange, (Scalar b, Scalar e, Scalar st, Tensor o), o.copy_(at::arange(b, e, st, o.options())))
ACLNN(aclnnCat, (Tensors l, int64_t d, Tensor o), o.copy_(at::cat(l, d)))
ACLNN(aclnnConstantPadNd, (Tensor a, Sizes p, Scalar v, Tensor o), o.copy_(at::constant_pad_nd(a, p, v)))
ACLNN(aclnnEmbedding, (Tensor w, Tensor i, Tensor o), o.copy_(at::embedding(w, i)))
ACLNN(aclnnIndex, (Tensor a, Tensors l, Tensor o), o.copy_(index(a, l)))
ACLNN(aclnnIndexSelect, (Tensor a, int64_t d, Tensor i, Tensor o), o.copy_(at::index_select(a, d, i)))
ACLNN(aclnnGather, (Tensor a, int64_t d, Tensor i, Tensor o), o.copy_(at::gather(a, d, i)))
ACLNN(aclnnSWhere, (Tensor c, Tensor a, Tensor b, Tensor o), o.copy_(at::where(c, a, b)))

// ---- arithmetic --------------------------------------------------
ACLNN(aclnnAdd, (Tensor a, Tensor b, Scalar k, Tensor o), o.copy_(at::add(a, b, k)))
ACLNN(aclnnAdds, (Tensor a, Scalar b, Scalar k, Tensor o), o.copy_(at::add(a, b, k)))
ACLNN(aclnnInplaceAdd, (Tensor a, Tensor b, Scalar k), a.add_(b, k))
ACLNN(aclnnInplaceAdds, (Tensor a, Scalar b, Scalar k), a.add_(b, k))
ACLNN(aclnnSub, (Tensor a, Tensor b, Scalar k, Tensor o), o.copy_(at::sub(a, b, k)))
ACLNN(aclnnSubs, (Tensor a, Scalar b, Scalar k, Tensor o), o.copy_(at::sub(a, b, k)))
ACLNN(aclnnInplaceSub, (Tensor a, Tensor b, Scalar k), a.sub_(b, k))
ACLNN(aclnnInplaceSubs, (Tensor a, Scalar b, Scalar k), a.sub_(b, k))
ACLNN(aclnnMul, (Tensor a, Tensor b, Tensor o), o.copy_(at::mul(a, b)))
ACLNN(aclnnMuls, (Tensor a, Scalar b, Tensor o), o.copy_(at::mul(a, b)))
ACLNN(aclnnInplaceMul, (Tensor a, Tensor b), a.mul_(b))
ACLNN(aclnnInplaceMuls, (Tensor a, Scalar b), a.mul_(b))
ACLNN(aclnnDiv, (Tensor a, Tensor b, Tensor o), o.copy_(at::div(a, b)))
ACLNN(aclnnDivs, (Tensor a, Scalar b, Tensor o), o.copy_(at::div(a, b)))
ACLNN(aclnnInplaceDiv, (Tensor a, Tensor b), a.div_(b))
ACLNN(aclnnInplaceDivs, (Tensor a, Scalar b), a.div_(b))
ACLNN(aclnnInplaceLerps, (Tensor a, Tensor b, Scalar w), a.lerp_(b, w))
ACLNN(aclnnInplaceAddcmul, (Tensor a, Tensor b, Tensor c, Scalar k), a.addcmul_(b, c, k))
ACLNN(aclnnInplaceAddcdiv, (Tensor a, Tensor b, Tensor c, Scalar k), a.addcdiv_(b, c, k))
ACLNN(aclnnPowTensorScalar, (Tensor a, Scalar e, Tensor o), o.copy_(at::pow(a, e)))
#define UNARY(name, function)                                       \
  ACLNN(aclnn##name, (Tensor a, Tensor o), o.copy_(at::function(a))) \
  ACLNN(aclnnInplace##name, (Tensor a), a.copy_(at::function(a)))
UNARY(Neg, neg)
UNARY(Abs, abs)
UNARY(Sqrt, sqrt)
UNARY(Rsqrt, rsqrt)
UNARY(Exp, exp)
UNARY(Sin, sin)
UNARY(Cos, cos)
UNARY(Relu, relu)
UNARY(Silu, silu)
UNARY(Sigmoid, sigmoid)
UNARY(LogicalNot, logical_not)
UNARY(IsFinite, isfinite)
#define COMPARE(name, function)                                                      \
  ACLNN(aclnn##name##Tensor, (Tensor a, Tensor b, Tensor o), o.copy_(at::function(a, b))) \
  ACLNN(aclnn##name##Scalar, (Tensor a, Scalar b, Tensor o), o.copy_(at::function(a, b)))
COMPARE(Eq, eq)
COMPARE(Ne, ne)
COMPARE(Gt, gt)
COMPARE(Ge, ge)
COMPARE(Lt, lt)
COMPARE(Le, le)
ACLNN(aclnnEqual, (Tensor a, Tensor b, Tensor o), o.fill_(at::equal(a, b)))
ACLNN(aclnnThresholdBackward, (Tensor g, Tensor a, Scalar th, Tensor o),
      o.copy_(at::threshold_backward(g, a, th)))
ACLNN(aclnnForeachAddList, (Tensors a, Tensors b, Tensor k, Tensors o),
      for (size_t i = 0; i < a.size(); ++i) o[i].copy_(at::add(a[i], b[i], k.item())))

// ---- reductions --------------------------------------------------
ACLNN(aclnnReduceSum, (Tensor a, Sizes d, bool k, int dt, Tensor o),
      o.copy_(sum(a, d, k, dt).reshape(o.sizes())))
ACLNN(aclnnMean, (Tensor a, Sizes d, bool k, int dt, Tensor o), o.copy_(mean(a, d, k, dt).reshape(o.sizes())))
ACLNN(aclnnMax, (Tensor a, Tensor o), o.copy_(at::max(a)))
ACLNN(aclnnMin, (Tensor a, Tensor o), o.copy_(at::min(a)))
ACLNN(aclnnArgMax, (Tensor a, int64_t d, bool k, Tensor o), o.copy_(at::argmax(a, d, k)))
ACLNN(aclnnAll, (Tensor a, Sizes d, bool k, Tensor o), o.copy_(at::all(a, d, k).reshape(o.sizes())))
ACLNN(aclnnAny, (Tensor a, Sizes d, bool k, Tensor o), o.copy_(at::any(a, d, k).reshape(o.sizes())))
ACLNN(aclnnSoftmax, (Tensor a, int64_t d, Tensor o), o.copy_(at::softmax(a, d)))
ACLNN(aclnnLogSoftmax, (Tensor a, int64_t d, Tensor o), o.copy_(at::log_softmax(a, d)))

// ---- matrix products ---------------------------------------------
ACLNN(aclnnMatmul, (Tensor a, Tensor b, Tensor o, int8_t), o.copy_(at::matmul(a, b)))
ACLNN(aclnnMm, (Tensor a, Tensor b, Tensor o, int8_t), o.copy_(at::mm(a, b)))
ACLNN(aclnnBatchMatMul, (Tensor a, Tensor b, Tensor o, int8_t), o.copy_(at::bmm(a, b)))
ACLNN(aclnnAddmm, (Tensor c, Tensor a, Tensor b, Scalar be, Scalar al, Tensor o, int8_t),
      o.copy_(at::addmm(c, a, b, be, al)))

// ---- random ------------------------------------------------------
ACLNN(aclnnInplaceNormal, (Tensor a, float m, float sd, int64_t s, int64_t of),
      a.normal_(m, sd, generator(s, of)))
ACLNN(aclnnInplaceUniform, (Tensor a, double f, double t, uint64_t s, uint64_t of),
      a.uniform_(f, t, generator(s, of)))
ACLNN(aclnnInplaceRandom, (Tensor a, int64_t f, int64_t t, int64_t s, int64_t of),
      a.random_(f, t, generator(s, of)))
