/* The block-budget hook: virtual time advances by the code bytes of each translated block, and the slice ends before the
 * block that would start at or after its limit. Python holds the same rules; both stop at the same blocks.
 *
 * Each translated block begins with two calls, the hook and the core's own look whether to leave. The hook looks as well,
 * so the second is left out, without a twin because no guest can see it. */
#include "_budget.h"

static int (*core_leave)(void *, uint32_t);
static void (*core_call)(void *, void *, void *, int, void **);
static void (*core_inline_hook)(void *, char *, void **, int);

static void on_block(void *uc, uint64_t address, uint32_t size, void *data)
{
    budget *b = data;
    volatile int64_t *cells = b->cells;
    int64_t now = cells[0];
    (void)address;
    if (__builtin_expect(now < cells[1], 1)) {
        int64_t charge = b->frac + (int64_t)size * b->rate;
        if (__builtin_expect(*b->exit_pending, 0))
            goto leave;
        cells[0] = now + (charge >> 8);
        b->frac = charge & 255;
        if (__builtin_expect(*b->resume & RF, 0)) {
            if (b->resume != &b->returning) {
                *b->resume &= ~(uint64_t)RF;
            } else if (!b->returned) { /* it was charged before it exited */
                b->returned = 1;
                cells[0] = now;
                b->frac = charge - (int64_t)size * b->rate;
            } else {
                intercept_returns(b);
                *b->resume &= ~(uint64_t)RF;
            }
        }
        return;
    }
    if (!*b->exit_pending) {
        b->stops++;
        b->stop(uc);
    }
leave:
    if (b->leave)
        b->leave(uc, 0);
}

/* On the public path a pending exit is out of sight, and the core's look stays. */
static void on_block_public(void *uc, uint64_t address, uint32_t size, void *data)
{
    on_block(uc, address, size, data);
}

/* The core's tcg_gen_callN: a call goes into the block that is being translated. */
static void on_call(void *translation, void *function, void *result, int count, void **arguments)
{
    static _Thread_local bool looked;
    bool again = looked && function == (void *)(uintptr_t)core_leave;
    looked = function == (void *)(uintptr_t)on_block;
    if (looked && running)
        running->translation = translation;
    if (!again)
        core_call(translation, function, result, count, arguments);
}

/* The core's uc_add_inline_hook: a hook's call goes into a block. The core names and registers it anew for each block; for
 * the block hook once will do. */
static void on_inline_hook(void *uc, char *hook, void **arguments, int count)
{
    enum { CALLBACK = 0x28 };
    budget *b = running;
    if (b && b->uc == uc && b->translation && *(void **)(hook + CALLBACK) == (void *)(uintptr_t)on_block)
        on_call(b->translation, (void *)(uintptr_t)on_block, NULL, count, arguments);
    else
        core_inline_hook(uc, hook, arguments, count);
}

/* uc_emu_start for the slice of this budget. */
static int enter(budget *b, void *uc, uint64_t rip, size_t count)
{
    int error;
    running = b;
    b->counted = (int64_t)count;
    error = b->start(uc, rip, 0, 0, count);
    intercept_returns(b);
    running = NULL;
    return error;
}

#define ADDRESS(function) (unsigned long long)(uintptr_t)(function)

static PyObject *addresses(PyObject *self, PyObject *arguments)
{
    unsigned long long fill, tlb, leave, call, inline_hook, walk_store;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KKKKKK", &fill, &tlb, &leave, &call, &inline_hook, &walk_store))
        return NULL;
    core_fill = (tlb_filler *)(uintptr_t)fill;
    tlb_offset = tlb;
    core_leave = (int (*)(void *, uint32_t))(uintptr_t)leave;
    core_call = (void (*)(void *, void *, void *, int, void **))(uintptr_t)call;
    core_inline_hook = (void (*)(void *, char *, void **, int))(uintptr_t)inline_hook;
    core_walk_store = (void (*)(void *, uint64_t, uint32_t))(uintptr_t)walk_store;
    return Py_BuildValue("(KKKKKKKKKKKKKKn)", ADDRESS(on_block), ADDRESS(on_block_public), ADDRESS(on_interrupt),
                         ADDRESS(on_translate), ADDRESS(on_fill), ADDRESS(on_new_code), ADDRESS(on_call),
                         ADDRESS(on_inline_hook), ADDRESS(enter), ADDRESS(on_in), ADDRESS(on_out), ADDRESS(on_mmio_read),
                         ADDRESS(on_mmio_write), ADDRESS(on_walk_store), (Py_ssize_t)sizeof(budget));
}

/* deliver(address of the budget, vector, kind, error code or -1, the RIP that is pushed, or None for the guest's) */
static PyObject *deliver_for_python(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    budget *b;
    uint64_t rip;
    (void)self;
    (void)count;
    b = PyLong_AsVoidPtr(arguments[0]);
    if (!b)
        return NULL;
    rip = arguments[4] == Py_None ? *b->eip : PyLong_AsUnsignedLongLongMask(arguments[4]);
    return PyBool_FromLong(deliver(b, (uint32_t)PyLong_AsLong(arguments[1]), (uint32_t)PyLong_AsLong(arguments[2]),
                                   PyLong_AsLongLong(arguments[3]), rip));
}

static PyMethodDef methods[] = {
    {"deliver", (PyCFunction)(void (*)(void))deliver_for_python, METH_FASTCALL,
     "With a budget's address, an event's vector, kind and error code (-1: none), and the RIP that is pushed (None: the "
     "guest's): whether it was delivered. If not, nothing has changed."},
    {"addresses", addresses, METH_VARARGS,
     "With the addresses of the core's page walk, of where its CPUState has the TLB, of its look whether to leave, of what puts "
     "calls of functions and of hooks into blocks, and of the page walk's stores: the addresses of the hooks (block, and on "
     "the public path, interrupt, translation), of what stands before the page walk, the search for new code's entry and those calls, of the slice's "
     "entry, of the hooks of IN and OUT and of loads and stores where no memory is, of what stands before those stores, and "
     "the size of the structure they share."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_budget", "The native block-budget hook.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__budget(void)
{
    if (!name_questions())
        return NULL;
    return PyModule_Create(&module);
}
