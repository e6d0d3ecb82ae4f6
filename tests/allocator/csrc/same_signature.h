// Compares the type of a function as the pool declares it with that of the vendor's header.
#pragma once

#include <type_traits>

// A vendor's enumeration is an int here; a structure is one of the same layout; the rest is the same type.
template <typename Own, typename Real>
struct Same : std::is_same<Own, Real> {};

template <typename Own, typename Real>
constexpr bool is_enumeration() {
  if constexpr (std::is_same_v<Own, int> && std::is_enum_v<Real>) return sizeof(Real) == sizeof(int);
  return false;
}

template <typename Own, typename Real>
constexpr bool same_value = Same<Own, Real>::value || is_enumeration<Own, Real>();

template <typename Own, typename Real>
constexpr bool same_pointee = std::is_const_v<Own> == std::is_const_v<Real> &&
                              same_value<std::remove_const_t<Own>, std::remove_const_t<Real>>;

template <typename Own, typename Real>
constexpr bool same_parameter() {
  if constexpr (Same<Own, Real>::value) {
    return true;
  } else if constexpr (std::is_pointer_v<Own> && std::is_pointer_v<Real>) {
    return same_pointee<std::remove_pointer_t<Own>, std::remove_pointer_t<Real>>;
  } else {
    return same_value<Own, Real>;
  }
}

template <typename Own, typename Real>
struct SameFunction : std::false_type {};

template <typename OwnResult, typename... Own, typename RealResult, typename... Real>
struct SameFunction<OwnResult (*)(Own...), RealResult (*)(Real...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Own) == sizeof...(Real)) {
      return same_parameter<OwnResult, RealResult>() && (same_parameter<Own, Real>() && ...);
    } else {
      return false;
    }
  }();
};
