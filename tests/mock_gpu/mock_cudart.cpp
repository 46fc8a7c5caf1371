// A CUDA runtime without a GPU: allocations are reserved addresses that nobody may touch, kernels and copies do
// nothing, copies to the host give zeros. LD_PRELOAD goes before libcudart, libcublas, libnccl.
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#define API extern "C" __attribute__((visibility("default")))
static std::atomic<long> launches{0}, syncs{0}, h2d{0}, d2h{0}, d2d{0}, memsets{0}, gemms{0}, mallocs{0}, frees{0},
    events{0}, hostallocs{0}, d2h_pageable{0}, h2d_pageable{0}, nccl{0}, occ{0}, devgets{0};
static std::mutex mu;
static std::map<char*, size_t> dev, host;  // address -> size
static std::map<char*, int> devidx;
static size_t used[16];
static thread_local int current = 0;
static std::set<int> contexts;  // devices touched by allocation or stream
static int ndev() {
    const char* e = getenv("MOCK_CUDA_DEVICES");
    return e ? atoi(e) : 1;
}
static size_t total() {
    const char* e = getenv("MOCK_CUDA_GIB");
    return (size_t)((e ? atof(e) : 23.57) * (1ull << 30));
}
static size_t context_bytes() {
    const char* e = getenv("MOCK_CUDA_CONTEXT_GIB");
    return (size_t)((e ? atof(e) : 0.30) * (1ull << 30));
}
API long mock_count(int which) {
    std::atomic<long>* all[] = {&launches,     &syncs,   &h2d,   &d2h,    &d2d,        &memsets,
                                &gemms,        &mallocs, &frees, &events, &hostallocs, &d2h_pageable,
                                &h2d_pageable, &nccl,    &occ,   &devgets};
    return *all[which];
}
API long mock_used(int d) { return used[d]; }
static bool inside(std::map<char*, size_t>& m, const void* p) {
    std::lock_guard<std::mutex> l(mu);
    auto it = m.upper_bound((char*)p);
    if (it == m.begin()) return false;
    --it;
    return (char*)p < it->first + (it->second ? it->second : 1);
}
API cudaError_t cudaGetDeviceCount(int* n) {
    *n = ndev();
    return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
    *d = current;
    devgets++;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= ndev()) return cudaErrorInvalidDevice;
    current = d;
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
    memset(p, 0, sizeof *p);
    const char* e = getenv("MOCK_CUDA_SM");
    int sm = e ? atoi(e) : 86;
    strcpy(p->name, "Mock GPU");
    p->major = sm / 10;
    p->minor = sm % 10;
    p->multiProcessorCount = 82;
    p->totalGlobalMem = total();
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 1536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 101376;
    p->sharedMemPerMultiprocessor = 102400;
    p->regsPerMultiprocessor = 65536;
    p->regsPerBlock = 65536;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->l2CacheSize = 6 << 20;
    p->textureAlignment = 512;
    p->memoryBusWidth = 384;
    p->concurrentKernels = 1;
    p->unifiedAddressing = 1;
    p->asyncEngineCount = 2;
    p->maxBlocksPerMultiProcessor = 16;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
    switch ((int)a) {
        case 1:
            *v = 1024;
            break;
        case 8:
            *v = 49152;
            break;
        case 10:
            *v = 32;
            break;
        case 16:
            *v = 82;
            break;
        case 39:
            *v = 1536;
            break;
        case 75:
            *v = 8;
            break;
        case 76:
            *v = 6;
            break;
        case 97:
            *v = 101376;
            break;
        case 81:
            *v = 102400;
            break;
        default:
            *v = 1;
    }
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
    strncpy(s, "0000:01:00.0", n);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
    *a = 0;
    *b = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
    *v = 0;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() {
    syncs++;
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaGetLastError() { return cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
static std::atomic<long> handles{0x1000};
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
    *s = (cudaStream_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    *s = (cudaStream_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = (cudaStream_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
    *p = 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) {
    syncs++;
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
    *s = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id,
                                         cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e,
                                         size_t* n) {
    *s = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (n) *n = 0;
    return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t* e) {
    *e = (cudaEvent_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    *e = (cudaEvent_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    events++;
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) {
    events++;
    return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) {
    *t = 1;
    return cudaSuccess;
}
API cudaError_t cudaMalloc(void** p, size_t n) {
    mallocs++;
    {
        std::lock_guard<std::mutex> l(mu);
        contexts.insert(current);
        if (used[current] + n + context_bytes() > total()) {
            *p = nullptr;
            return cudaErrorMemoryAllocation;
        }
    }
    void* q = mmap(nullptr, n ? n : 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (q == MAP_FAILED) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> l(mu);
    dev[(char*)q] = n;
    devidx[(char*)q] = current;
    used[current] += n;
    *p = q;
    return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    frees++;
    std::lock_guard<std::mutex> l(mu);
    auto it = dev.find((char*)p);
    if (it == dev.end()) return cudaErrorInvalidValue;
    used[devidx[(char*)p]] -= it->second;
    munmap(p, it->second);
    dev.erase(it);
    devidx.erase((char*)p);
    return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    hostallocs++;
    if (posix_memalign(p, 4096, n ? n : 1)) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> l(mu);
    host[(char*)*p] = n;
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
    {
        std::lock_guard<std::mutex> l(mu);
        host.erase((char*)p);
    }
    free(p);
    return cudaSuccess;
}
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
    *t = total();
    *f = total() - used[current] - context_bytes();
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    a->device = current;
    if (inside(dev, p)) {
        a->type = cudaMemoryTypeDevice;
        a->devicePointer = (void*)p;
    } else if (inside(host, p)) {
        a->type = cudaMemoryTypeHost;
        a->hostPointer = (void*)p;
        a->devicePointer = (void*)p;
    }
    return cudaSuccess;
}
static cudaError_t copy(void* d, const void* s, size_t n) {
    bool dd = inside(dev, d), sd = inside(dev, s);
    if (dd && sd)
        d2d++;
    else if (dd) {
        h2d++;
        if (!inside(host, s)) h2d_pageable++;
    } else if (sd) {
        d2h++;
        if (!inside(host, d)) d2h_pageable++;
        memset(d, 0, n);
        if (getenv("MOCK_CUDA_FILL")) {  // ones: 8-byte integers, one float32, or booleans
            float one = 1;
            if (n % 8 == 0)
                for (size_t i = 0; i < n; i += 8) *(long long*)((char*)d + i) = 1;
            else if (n == 4)
                memcpy(d, &one, n);
            else
                memset(d, 1, n);
        }
    } else
        memcpy(d, s, n);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { return copy(d, s, n); }
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
    return copy(d, s, n);
}
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) { return copy(d, s, n); }
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaMemset(void*, int, size_t) {
    memsets++;
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
    memsets++;
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
    launches++;
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
    launches++;
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
    *k = (cudaKernel_t)f;
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    launches++;
    return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->binaryVersion = a->ptxVersion = 86;
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    occ++;
    *n = 2;
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
    *p = (void*)0x1000;
    return cudaSuccess;
}
static long stub_driver(...) { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
    *f = (void*)stub_driver;
    if (r) *r = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API void mock_gemm() {
    gemms++;
    launches++;
}
API void mock_nccl() { nccl++; }
#include <execinfo.h>
#include <signal.h>
#include <unistd.h>
static void crash(int) {
    void* b[40];
    int n = backtrace(b, 40);
    backtrace_symbols_fd(b, n, 2);
    _exit(139);
}
__attribute__((constructor)) static void install() {
    if (getenv("MOCK_CUDA_TRACE")) signal(SIGSEGV, crash);
}
