// A GPU that does not exist: CUDA, cuBLAS, cuDNN and NCCL whose kernels do nothing.
//
// pretended_gpu.py adds all other calls that torch makes, each returning 0 (success), and loads the
// whole before the real libraries. Memory is zeros of the host, kept for copies; every call gives
// back what torch needs to go on. PRETENDED_GPUS, PRETENDED_GIB, PRETENDED_MAJOR: how many GPUs,
// their memory, their compute capability. Layouts and constants are those of CUDA 12 and 13.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, INVALID_DEVICE = 101, OUT_OF_MEMORY = 2 };
static __thread int current;
static long launches, waits, used[64];

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

// What has happened so far: kernels that were launched, and times that the host waited for a GPU.
long pretended_launches(void) { return __atomic_load_n(&launches, __ATOMIC_RELAXED); }
long pretended_waits(void) { return __atomic_load_n(&waits, __ATOMIC_RELAXED); }
static int add_one(long *count) {
  __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}

// ------------------------------------------------------------------------------- devices
int cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = number("PRETENDED_GPUS", 1);
  if (visible) {
    int listed = *visible != 0;
    for (const char *c = visible; *c; c++) listed += *c == ',';
    if (listed < *count) *count = listed;
  }
  return SUCCESS;
}
int cudaGetDevice(int *device) {
  *device = current;
  return SUCCESS;
}
int cudaSetDevice(int device) {
  int count;
  cudaGetDeviceCount(&count);
  if (device >= count) return INVALID_DEVICE;
  current = device;
  return SUCCESS;
}

struct properties {  // the beginning of cudaDeviceProp
  char name[256], uuid[16], luid[8];
  unsigned mask;
  size_t memory, shared_memory;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3], clock;
  size_t constants;
  int major, minor, rest[150];
};
int cudaGetDeviceProperties(struct properties *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Pretended GPU");
  memset(p->uuid, 1 + device, sizeof p->uuid);
  p->memory = number("PRETENDED_GIB", 80) << 30;
  p->shared_memory = 48 << 10;
  p->registers = 65536;
  p->warp = 32;
  p->threads = p->block[0] = p->block[1] = 1024;
  p->block[2] = 64;
  p->grid[0] = p->grid[1] = p->grid[2] = 65535;
  p->major = number("PRETENDED_MAJOR", 8);
  for (int i = 0; i < 150; i++) p->rest[i] = 1024;
  return SUCCESS;
}
int cudaGetDeviceProperties_v2(struct properties *p, int device) {  // its name in CUDA 12
  return cudaGetDeviceProperties(p, device);
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? number("PRETENDED_MAJOR", 8) : attribute == 76 ? 0 : 1024;
  return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0; }
static int version(int *value) {
  *value = 13000;
  return SUCCESS;
}
int cudaDriverGetVersion(int *value) { return version(value); }
int cudaRuntimeGetVersion(int *value) { return version(value); }
char *cudaGetErrorString(int error) {
  return error == OUT_OF_MEMORY ? "out of memory" : "an error of the pretended GPU";
}
char *cudaGetErrorName(int error) { return cudaGetErrorString(error); }

// -------------------------------------------------------------------------------- memory
enum { HEADER = 4096, LARGE = 1 << 20 };  // before a block stand its size and its device
int cudaMalloc(void **pointer, size_t size) {
  *pointer = NULL;
  if (used[current] + size > (size_t)number("PRETENDED_GIB", 80) << 30) return OUT_OF_MEMORY;
  size_t whole = size + HEADER;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;  // no page of it until it is written
  size_t *block = whole < LARGE ? calloc(1, whole)
                                : mmap(NULL, whole, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (!block || block == MAP_FAILED) return OUT_OF_MEMORY;
  block[0] = whole;
  block[1] = current;
  __atomic_fetch_add(&used[current], size, __ATOMIC_RELAXED);
  *pointer = (char *)block + HEADER;
  return SUCCESS;
}
int cudaFree(void *pointer) {
  if (!pointer) return SUCCESS;
  size_t *block = (size_t *)((char *)pointer - HEADER), whole = block[0];
  __atomic_fetch_sub(&used[block[1]], whole - HEADER, __ATOMIC_RELAXED);
  if (whole < LARGE) free(block);
  else munmap(block, whole);
  return SUCCESS;
}
int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = number("PRETENDED_GIB", 80) << 30;
  *available = *total - used[current];
  return SUCCESS;
}
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  return posix_memalign(pointer, 4096, size) ? OUT_OF_MEMORY : SUCCESS;
}
int cudaFreeHost(void *pointer) {
  free(pointer);
  return SUCCESS;
}
int cudaPointerGetAttributes(void *attributes, const void *pointer) {
  memset(attributes, 0, 24);  // memory that CUDA does not know
  return SUCCESS;
}
static int answer = 1;  // what the host reads of a bool: "all are finite" holds
void pretended_answer(int value) { answer = value; }
enum { TO_HOST = 2, WITHIN = 3 };
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  if (kind != WITHIN || size <= LARGE) memmove(to, from, size);
  if (kind == TO_HOST && size == 1) *(char *)to = answer;
  return SUCCESS;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  add_one(&waits);
  return cudaMemcpyAsync(to, from, size, kind, NULL);
}
int cudaMemsetAsync(void *pointer, int value, size_t size, void *stream) {
  if (size <= LARGE) memset(pointer, value, size);
  return SUCCESS;
}
int cudaMemset(void *pointer, int value, size_t size) {
  return cudaMemsetAsync(pointer, value, size, NULL);
}

// ----------------------------------------------------------------------- launches, waits
int cudaLaunchKernel() { return add_one(&launches); }
int cudaLaunchKernelExC() { return add_one(&launches); }
int __cudaLaunchKernel() { return add_one(&launches); }
int cuLaunchKernel() { return add_one(&launches); }
int cuLaunchKernelEx() { return add_one(&launches); }
int cudaStreamSynchronize() { return add_one(&waits); }
int cudaEventSynchronize() { return add_one(&waits); }
int cudaDeviceSynchronize() { return add_one(&waits); }

// ------------------------------------------------------------- what CUDA and cuBLAS make
#define MAKES(call) \
  int call(void **made) { \
    *made = calloc(1, 64); \
    return SUCCESS; \
  }
MAKES(cudaEventCreate)
MAKES(cudaEventCreateWithFlags)
MAKES(cudaStreamCreate)
MAKES(cudaStreamCreateWithFlags)
MAKES(cudaStreamCreateWithPriority)
MAKES(cuCtxGetCurrent)
MAKES(cublasCreate_v2)
MAKES(cublasLtCreate)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cudnnCreate)

int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  *milliseconds = 1;
  return SUCCESS;
}
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { return *status = 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
  memset(results, 0, 96);
  *found = 1;
  return SUCCESS;
}
int cudaGetSymbolAddress(void **pointer) {
  static char zeros[1 << 16];
  *pointer = zeros;
  return SUCCESS;
}
int cudaFuncGetAttributes(size_t *sizes, const void *function) {
  int *numbers = (int *)(sizes + 3);  // threads of a block, registers, versions
  memset(sizes, 0, 3 * sizeof *sizes);
  numbers[0] = 1024;
  numbers[1] = 32;
  numbers[2] = numbers[3] = 10 * number("PRETENDED_MAJOR", 8);
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 2;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks);
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[8];
  return handle;
}
int __cudaGetKernel(void **kernel, void *function) {
  *kernel = function;
  return SUCCESS;
}
struct dim3 { unsigned x, y, z; };
int __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared,
                               void **stream) {
  *grid = *block = (struct dim3){1, 1, 1};
  *shared = 0;
  *stream = NULL;
  return SUCCESS;
}
static int nothing(void) { return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return SUCCESS;
}
int cudaGetDriverEntryPointByVersion(const char *name, void **call, unsigned version,
                                     unsigned long long flags, int *result) {
  int is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *call = is_state ? (void *)cuDevicePrimaryCtxGetState : (void *)nothing;
  if (result) *result = SUCCESS;
  return SUCCESS;
}

// --------------------------------------------------- cuDNN: one engine, without workspace
size_t cudnnGetVersion(void) { return 91000; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int status) { return "pretended"; }
void cudnnGetLastErrorString(char *message, size_t size) { *message = 0; }
int cudnnBackendCreateDescriptor(int type, void **made) {
  *made = calloc(1, 64);
  return SUCCESS;
}
int cudnnBackendDestroyDescriptor(void *descriptor) {
  free(descriptor);
  return SUCCESS;
}
enum { ENGINE_HEURISTICS = 202, CONFIGURED_ENGINE = 300, CONFIGURED_WORKSPACE = 303,
       PLAN_WORKSPACE = 402, ENGINE_INDEX = 1301, INT64 = 3 };
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long asked, long *count,
                             long *values) {
  long found = name == ENGINE_HEURISTICS || name == CONFIGURED_ENGINE;
  if (type == INT64 && (name == CONFIGURED_WORKSPACE || name == PLAN_WORKSPACE ||
                        name == ENGINE_INDEX)) {
    found = 1;
    if (values && asked) *values = 0;
  }
  if (count) *count = found;
  return SUCCESS;
}

typedef void *P;
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(P handle, int mode, int with, P x, P z,
                                                             P y, P scale, P act, size_t *size) {
  return *size = 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(P handle, int mode, int with, P x, P y, P dy,
                                                      P dz, P dx, P scale, P act, size_t *size) {
  return *size = 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(P handle, int mode, int with, P act, P x,
                                                         size_t *size) {
  return *size = 0;
}

// --------------------------------------------- NCCL: all ranks have what this rank has
static const int SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // bytes, by type
int ncclGetVersion(int *value) {
  *value = 22700;
  return SUCCESS;
}
struct id { char bytes[128]; };
int ncclCommInitRankConfig(long **made, int ranks, struct id id, int rank, void *config) {
  *made = calloc(1, 64);
  **made = ranks;
  return SUCCESS;
}
int ncclCommGetAsyncError(void *communicator, int *error) { return *error = 0; }
const char *ncclGetErrorString(int error) { return "pretended"; }
const char *ncclGetLastError(void *communicator) { return "pretended"; }
int ncclAllGather(char *from, char *to, size_t count, int type, long *ranks, void *stream) {
  size_t size = count * SIZES[type];
  for (long rank = 0; rank < *ranks && size <= LARGE; rank++) memmove(to + rank * size, from, size);
  return SUCCESS;
}
int ncclAllReduce(void *from, void *to, size_t count, int type, int operation, long *ranks,
                  void *stream) {
  if (count * SIZES[type] <= LARGE) memmove(to, from, count * SIZES[type]);
  return SUCCESS;
}
int ncclBroadcast(void *from, void *to, size_t count, int type, int root, long *ranks,
                  void *stream) {
  if (count * SIZES[type] <= LARGE) memmove(to, from, count * SIZES[type]);
  return SUCCESS;
}
