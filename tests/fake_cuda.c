/* The part of NVIDIA's driver that the runtime calls, on the memory of the host. Work of streams is queued, and done
   when something waits for it. Images are the JSON of kernels, whose types say how large the parameters are. Errors
   are those of the driver: 1 invalid value, 2 out of memory, 3 not initialised, 200 invalid image, 201 no context,
   400 invalid handle, 900 not allowed while capturing. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define API __attribute__((visibility("default")))
enum { MOST = 4096, PARAMETERS = 128, PACKED = 1024 };
typedef uint64_t address;
typedef void launch_hook(const char *image, const unsigned *grid, unsigned threads, const unsigned char *packed);
typedef struct { int kind; int64_t handle, recorded; } object;
typedef struct { char *image; int count, sizes[PARAMETERS], shared; } function;
typedef struct { size_t x, y; int kind; void *host; address device; void *array; size_t pitch; } side;
typedef struct { side source, target; size_t width, height; } copy2d;
typedef struct {
    int allocation, handles, location, device;
    void *security;
    size_t most;
    unsigned short usage;
    unsigned char reserved[54];
} pool_properties;
typedef struct {
    enum { LAUNCH, TO_DEVICE, TO_HOST, COPY, SET, FREE } kind;
    address to, from;
    size_t width, height, to_pitch, from_pitch;
    unsigned char *held;
    function *kernel;
    unsigned grid[3], threads;
} work;
typedef struct { work *list; int count; } graph;
enum { STREAM = 11, EVENT, POOL, MODULE, FUNCTION, GRAPH, EXEC };

static struct { address start; size_t size; int live; } rooms[MOST];
static int room_count, initialised, depth, capturing, devices = 1, pools = 1, fails_with;
static const char *fails_at = "";
static size_t total = 1 << 28, used;
static work queue[1 << 16];
static int queued;
static int64_t performed;
static graph noted;
static launch_hook *hook;
static char record[1 << 18];

API void fake_reset(int device_count, int has_pools, size_t memory)
{
    initialised = depth = capturing = queued = room_count = 0, performed = 0;
    devices = device_count, pools = has_pools, total = memory, used = 0, fails_at = "", record[0] = 0;
}
API void fake_hook(launch_hook *called) { hook = called; }
API void fake_fail(const char *name, int code) { fails_at = strdup(name), fails_with = code; }
API const char *fake_record(void) { return record; }
API int fake_live(void)
{
    int n = 0;
    for (int i = 0; i < room_count; i++) n += rooms[i].live;
    return n;
}
API size_t fake_room(address at)
{
    for (int i = 0; i < room_count; i++)
        if (rooms[i].live && at >= rooms[i].start && at < rooms[i].start + rooms[i].size)
            return rooms[i].start + rooms[i].size - at;
    return 0;
}

static int begin(const char *name)
{
    size_t n = strlen(record);
    snprintf(record + n, sizeof record - n, "%s\n", name);
    return !strcmp(name, fails_at) ? fails_with : initialised ? depth ? 0 : 201 : 3;
}
#define BEGIN(name) int error = begin(name); if (error) return error
#define NOT_CAPTURED if (capturing) return 900
#define REQUIRE(condition, code) if (!(condition)) return code

static void *made(int kind, void *what)
{
    object *found = calloc(1, sizeof *found);
    found->kind = kind, found->handle = (int64_t)what;
    return found;
}
static int is(const void *handle, int kind) { return handle && ((const object *)handle)->kind == kind; }
static void *what(void *handle) { return (void *)((object *)handle)->handle; }

static void drop(address at)
{
    for (int i = 0; i < room_count; i++)
        if (rooms[i].live && rooms[i].start == at) {
            rooms[i].live = 0, used -= rooms[i].size;
            memset((void *)at, 0xEE, rooms[i].size);
        }
}
static void perform(const work *w)
{
    switch (w->kind) {
    case LAUNCH:
        if (hook) hook(w->kernel->image, w->grid, w->threads, w->held);
        break;
    case TO_DEVICE: memcpy((void *)w->to, w->held, w->width); break;
    case TO_HOST: memcpy((void *)w->to, (void *)w->from, w->width); break;
    case COPY:
        for (size_t i = 0; i < w->height; i++)
            memcpy((void *)(w->to + i * w->to_pitch), (void *)(w->from + i * w->from_pitch), w->width);
        break;
    case SET: memset((void *)w->to, 0, w->width); break;
    case FREE: drop(w->to); break;
    }
}
static void wait_for(int64_t last)
{
    int count = (int)(last - performed);
    for (int i = 0; i < count; i++) perform(queue + i);
    if (count > 0) {
        memmove(queue, queue + count, sizeof *queue * (size_t)(queued - count));
        queued -= count, performed += count;
    }
}
static void wait_for_all(void) { wait_for(performed + queued); }
static int give(work w)
{
    if (capturing) {
        if (w.kind != LAUNCH) return 900;
        noted.list = realloc(noted.list, sizeof w * (size_t)(noted.count + 1));
        noted.list[noted.count++] = w;
    } else {
        queue[queued++] = w;
    }
    return 0;
}

API int cuInit(unsigned flags) { initialised = 1; return flags ? 1 : devices ? 0 : 100; }
API int cuDeviceGet(int *device, int n) { *device = n; return n < devices ? 0 : 101; }
API int cuDeviceGetAttribute(int *value, int which, int device)
{
    REQUIRE(device < devices, 101);
    *value = which == 75 ? 9 : which == 76 ? 0 : which == 115 ? pools : which == 97 ? 227 * 1024 : -1;
    return *value < 0;
}
API int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &depth; return device < devices ? 0 : 101; }
API int cuCtxPushCurrent_v2(void *context) { REQUIRE(context == &depth, 201); depth++; return 0; }
API int cuCtxPopCurrent_v2(void **context) { REQUIRE(depth, 201); *context = &depth, depth--; return 0; }
API int cuGetErrorString(int code, const char **text) { *text = code == 100 ? "no device" : "a fault"; return 0; }

API int cuStreamCreate(void **stream, unsigned flags)
{
    BEGIN("cuStreamCreate");
    *stream = made(STREAM, 0);
    return flags != 1;
}
API int cuStreamSynchronize(void *stream)
{
    BEGIN("cuStreamSynchronize");
    NOT_CAPTURED;
    REQUIRE(is(stream, STREAM), 400);
    wait_for_all();
    return 0;
}
API int cuStreamWaitEvent(void *stream, void *event, unsigned flags)
{
    BEGIN("cuStreamWaitEvent");
    REQUIRE(is(event, EVENT) && (!stream || is(stream, STREAM)), 400);
    return flags != 0;
}
API int cuEventCreate(void **event, unsigned flags)
{
    BEGIN("cuEventCreate");
    *event = made(EVENT, (void *)(int64_t)flags);
    return flags & ~2u ? 1 : 0;
}
API int cuEventRecord(void *event, void *stream)
{
    BEGIN("cuEventRecord");
    REQUIRE(is(event, EVENT) && (!stream || is(stream, STREAM)), 400);
    ((object *)event)->recorded = performed + queued;
    return 0;
}
API int cuEventSynchronize(void *event)
{
    BEGIN("cuEventSynchronize");
    NOT_CAPTURED;
    REQUIRE(is(event, EVENT), 400);
    wait_for(((object *)event)->recorded);
    return 0;
}
API int cuMemHostAlloc(void **at, size_t size, unsigned flags)
{
    BEGIN("cuMemHostAlloc");
    NOT_CAPTURED;
    *at = calloc(1, size);
    return flags != 0;
}
API int cuEventElapsedTime(float *ms, void *first, void *last)
{
    BEGIN("cuEventElapsedTime");
    REQUIRE(is(first, EVENT) && is(last, EVENT) && !what(first) && !what(last), 400);
    *ms = 1.5f;
    return 0;
}
API int cuEventDestroy_v2(void *event)
{
    BEGIN("cuEventDestroy");
    REQUIRE(is(event, EVENT), 400);
    ((object *)event)->kind = 0;
    return 0;
}

API int cuMemGetInfo_v2(size_t *free, size_t *all)
{
    BEGIN("cuMemGetInfo");
    *free = total - used, *all = total;
    return 0;
}
static int take(address *at, size_t size)
{
    REQUIRE(size, 1);
    if (size > total - used) return 2;
    char *start = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(start, 0xFF, size);
    *at = (address)start, used += size;
    rooms[room_count].start = *at, rooms[room_count].size = size, rooms[room_count++].live = 1;
    return 0;
}
API int cuMemAlloc_v2(address *at, size_t size) { BEGIN("cuMemAlloc"); NOT_CAPTURED; return take(at, size); }
API int cuMemFree_v2(address at)
{
    BEGIN("cuMemFree");
    NOT_CAPTURED;
    REQUIRE(fake_room(at), 1);
    wait_for_all();
    drop(at);
    return 0;
}
API int cuMemPoolCreate(void **pool, const pool_properties *p)
{
    BEGIN("cuMemPoolCreate");
    REQUIRE(p->allocation == 1 && !p->handles && p->location == 1 && p->device < devices, 1);
    REQUIRE(sizeof *p == 88 && !p->security && !p->most && !p->usage && !p->reserved[53], 1);
    *pool = made(POOL, 0);
    return 0;
}
API int cuMemPoolSetAttribute(void *pool, int which, void *value)
{
    BEGIN("cuMemPoolSetAttribute");
    REQUIRE(is(pool, POOL), 400);
    return which != 4 || *(uint64_t *)value != UINT64_MAX;
}
API int cuMemPoolTrimTo(void *pool, size_t kept)
{
    BEGIN("cuMemPoolTrimTo");
    REQUIRE(is(pool, POOL), 400);
    return kept != 0;
}
API int cuMemAllocFromPoolAsync(address *at, size_t size, void *pool, void *stream)
{
    BEGIN("cuMemAllocFromPoolAsync");
    NOT_CAPTURED;
    REQUIRE(is(pool, POOL) && is(stream, STREAM), 400);
    return take(at, size);
}
API int cuMemFreeAsync(address at, void *stream)
{
    BEGIN("cuMemFreeAsync");
    REQUIRE(is(stream, STREAM), 400);
    REQUIRE(fake_room(at), 1);
    return give((work){.kind = FREE, .to = at});
}
API int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t size, void *stream)
{
    BEGIN("cuMemcpyHtoDAsync");
    REQUIRE(is(stream, STREAM), 400);
    REQUIRE(from && fake_room(to) >= size, 1);
    return give((work){.kind = TO_DEVICE, .to = to, .width = size, .held = memcpy(malloc(size + 1), from, size)});
}
API int cuMemcpyDtoHAsync_v2(void *to, address from, size_t size, void *stream)
{
    BEGIN("cuMemcpyDtoHAsync");
    REQUIRE(is(stream, STREAM), 400);
    REQUIRE(to && fake_room(from) >= size, 1);
    return give((work){.kind = TO_HOST, .to = (address)to, .from = from, .width = size});
}
API int cuMemcpyDtoDAsync_v2(address to, address from, size_t size, void *stream)
{
    BEGIN("cuMemcpyDtoDAsync");
    REQUIRE(is(stream, STREAM), 400);
    REQUIRE(fake_room(to) >= size && fake_room(from) >= size, 1);
    return give((work){.kind = COPY, .to = to, .from = from, .width = size, .height = 1});
}
API int cuMemcpy2DAsync_v2(const copy2d *c, void *stream)
{
    BEGIN("cuMemcpy2DAsync");
    REQUIRE(is(stream, STREAM), 400);
    const side *s = &c->source, *t = &c->target;
    REQUIRE(sizeof *c == 128 && s->kind == 2 && t->kind == 2 && !s->host && !t->host && !s->array && !t->array, 1);
    REQUIRE(!s->x && !s->y && !t->x && !t->y && s->pitch >= c->width && t->pitch >= c->width && c->height, 1);
    REQUIRE(fake_room(s->device) >= (c->height - 1) * s->pitch + c->width, 1);
    REQUIRE(fake_room(t->device) >= (c->height - 1) * t->pitch + c->width, 1);
    return give((work){.kind = COPY, .to = t->device, .from = s->device, .width = c->width, .height = c->height,
                       .to_pitch = t->pitch, .from_pitch = s->pitch});
}
API int cuMemsetD8Async(address to, unsigned char value, size_t size, void *stream)
{
    BEGIN("cuMemsetD8Async");
    REQUIRE(is(stream, STREAM), 400);
    REQUIRE(!value && fake_room(to) >= size, 1);
    return give((work){.kind = SET, .to = to, .width = size});
}

API int cuModuleLoadData(void **module, const char *image)
{
    BEGIN("cuModuleLoadData");
    NOT_CAPTURED;
    REQUIRE(image && !strncmp(image, "\x7f" "ELF{", 5), 200);
    *module = made(MODULE, strdup(image));
    return 0;
}
API int cuModuleGetFunction(void **function_, void *module, const char *name)
{
    BEGIN("cuModuleGetFunction");
    REQUIRE(is(module, MODULE), 400);
    function *f = calloc(1, sizeof *f);
    f->image = what(module), f->shared = 48 * 1024;
    char wanted[256];
    snprintf(wanted, sizeof wanted, "\"function\": \"%s\"", name);
    char *at = strstr(f->image, wanted);
    if (!at || !(at = strstr(at, "\"types\": {"))) return 500;
    char *end = strchr(at, '}');
    for (at += 10; (at = strstr(at, ": \"")) && at < end; at += 3)
        f->sizes[f->count++] = at[3] == '*' || !strncmp(at + 3, "i64", 3) ? 8 : 4;
    f->sizes[f->count++] = 8, f->sizes[f->count++] = 8;
    *function_ = made(FUNCTION, f);
    return 0;
}
API int cuFuncSetAttribute(void *kernel, int which, int value)
{
    BEGIN("cuFuncSetAttribute");
    REQUIRE(is(kernel, FUNCTION), 400);
    REQUIRE(which == 8 && value <= 227 * 1024, 1);
    ((function *)what(kernel))->shared = value;
    return 0;
}
API int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                       unsigned shared, void *stream, void **parameters, void **extra)
{
    BEGIN("cuLaunchKernel");
    REQUIRE(is(kernel, FUNCTION) && is(stream, STREAM), 400);
    function *f = what(kernel);
    REQUIRE(x && y && z && x < 1u << 31 && y < 65536 && z < 65536 && ty == 1 && tz == 1 && !extra && parameters, 1);
    REQUIRE(threads && threads % 32 == 0 && threads <= 1024 && shared <= (unsigned)f->shared, 1);
    unsigned char *packed = calloc(1, PACKED);
    for (int i = 0; i < f->count; i++) {
        REQUIRE(parameters[i], 1);
        memcpy(packed + 8 * i, parameters[i], (size_t)f->sizes[i]);
    }
    return give((work){.kind = LAUNCH, .kernel = f, .grid = {x, y, z}, .threads = threads, .held = packed});
}

API int cuStreamBeginCapture_v2(void *stream, int mode)
{
    BEGIN("cuStreamBeginCapture");
    NOT_CAPTURED;
    REQUIRE(is(stream, STREAM), 400);
    capturing = 1, noted = (graph){0};
    return mode != 1;
}
API int cuStreamEndCapture(void *stream, void **made_)
{
    BEGIN("cuStreamEndCapture");
    REQUIRE(is(stream, STREAM), 400);
    REQUIRE(capturing, 1);
    graph *found = malloc(sizeof *found);
    *found = noted, capturing = 0;
    *made_ = made(GRAPH, found);
    return 0;
}
API int cuGraphInstantiateWithFlags(void **exec, void *made_, unsigned long long flags)
{
    BEGIN("cuGraphInstantiateWithFlags");
    REQUIRE(is(made_, GRAPH), 400);
    *exec = made(EXEC, what(made_));
    return flags != 0;
}
API int cuGraphDestroy(void *made_)
{
    BEGIN("cuGraphDestroy");
    REQUIRE(is(made_, GRAPH), 400);
    ((object *)made_)->kind = 0;
    return 0;
}
API int cuGraphExecDestroy(void *exec)
{
    BEGIN("cuGraphExecDestroy");
    REQUIRE(is(exec, EXEC), 400);
    ((object *)exec)->kind = 0;
    return 0;
}
API int cuGraphLaunch(void *exec, void *stream)
{
    BEGIN("cuGraphLaunch");
    NOT_CAPTURED;
    REQUIRE(is(exec, EXEC) && is(stream, STREAM), 400);
    graph *g = what(exec);
    for (int i = 0; i < g->count; i++) give(g->list[i]);
    return 0;
}
