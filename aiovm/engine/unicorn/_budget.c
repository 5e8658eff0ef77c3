/* The block-budget hook: virtual time advances by the code bytes of each translated block, and the slice ends before the
 * block that would start at or after its limit. Python holds the same rules; both stop at the same blocks. */
#include "_budget.h"

static void on_block(void *uc, uint64_t address, uint32_t size, void *data)
{
    budget *b = data;
    volatile int64_t *cells = b->cells;
    int64_t now = cells[0];
    (void)address;
    if (__builtin_expect(now < cells[1], 1)) {
        int64_t charge = b->frac + (int64_t)size * b->rate;
        if (__builtin_expect(*b->exit_pending, 0))
            return;
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
    } else if (!*b->exit_pending) {
        b->stops++;
        b->stop(uc);
    }
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
    unsigned long long fill, tlb;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "KK", &fill, &tlb))
        return NULL;
    core_fill = (tlb_filler *)(uintptr_t)fill;
    tlb_offset = tlb;
    return Py_BuildValue("(KKKKKKKKKKn)", ADDRESS(on_block), ADDRESS(on_interrupt), ADDRESS(on_translate), ADDRESS(on_fill),
                         ADDRESS(on_new_code), ADDRESS(enter), ADDRESS(on_in), ADDRESS(on_out), ADDRESS(on_mmio_read),
                         ADDRESS(on_mmio_write), (Py_ssize_t)sizeof(budget));
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
     "With the address of the core's page walk, and where its CPUState has the TLB: the addresses of the hooks (block, "
     "interrupt, translation), of the page walk's cover, of what is called for new code, of the slice's entry, of the hooks "
     "of IN and OUT and of loads and stores where no memory is, and the size of the structure they share."},
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
