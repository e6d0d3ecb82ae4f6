// libhccl.so: called while a device is initialised; nothing else of HCCL is simulated.
#include "hccl/hccl.h"

extern "C" HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
