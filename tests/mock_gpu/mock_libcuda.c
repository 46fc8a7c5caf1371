#include <stddef.h>
#define V __attribute__((visibility("default")))
V int cuDevicePrimaryCtxGetState(int d, unsigned* f, int* a) {
    *f = 0;
    *a = 1;
    return 0;
}
V int cuCtxGetCurrent(void** c) {
    *c = (void*)1;
    return 0;
}
V int cuCtxSetCurrent(void* c) { return 0; }
V int cuInit(unsigned f) { return 0; }
V int cuDriverGetVersion(int* v) {
    *v = 13000;
    return 0;
}
V int cuDeviceGetCount(int* n) {
    *n = 1;
    return 0;
}
V int cuDeviceGet(int* d, int i) {
    *d = i;
    return 0;
}
V int cuGetErrorString(int e, const char** s) {
    *s = "mock";
    return 0;
}
V int cuGetProcAddress_v2(const char* n, void** f, int v, unsigned long long fl, void* r) {
    *f = NULL;
    return 0;
}
// The same file stands in for libnvidia-ml, which the allocator asks before it maps memory.
V int nvmlInit_v2() { return 0; }
V int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
    *device = (void*)1;
    return 0;
}
#define UNSUPPORTED(name) \
    V int name() { return 3; }
UNSUPPORTED(nvmlDeviceGetComputeRunningProcesses)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfoV)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlSystemGetCudaDriverVersion_v2)
