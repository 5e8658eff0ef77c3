/* What the guest's port (Python's) answers with numbers is only carried: the plain forms of CPUID, RDMSR, WRMSR and the
 * hypercall, IN and OUT, and loads and stores where no memory is. Registers become arguments, and the answer goes back.
 * Prefixed and single-stepped instructions Python decodes by itself. */
#include "_budget.h"

/* GuestPort's methods. */
enum question { ON_CPUID, ON_RDMSR, ON_WRMSR, ON_HYPERCALL, ON_IN, ON_OUT, ON_MMIO_READ, ON_MMIO_WRITE, QUESTIONS };
static const char *const NAMES[QUESTIONS] = {
    "on_cpuid", "on_rdmsr", "on_wrmsr", "on_hypercall", "on_in", "on_out", "on_mmio_read", "on_mmio_write",
};
static PyObject *questions[QUESTIONS];
enum { MOST_NUMBERS = 6 }; /* that a method takes */

bool name_questions(void)
{
    for (int i = 0; i < QUESTIONS; i++)
        if (!(questions[i] = PyUnicode_InternFromString(NAMES[i])))
            return false;
    return true;
}

/* Python raised: the engine keeps it. */
static void failed(budget *b)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (trace)
        PyException_SetTraceback(error, trace);
    Py_XDECREF(PyObject_CallFunctionObjArgs(b->fail, error, NULL));
    if (PyErr_Occurred())
        PyErr_WriteUnraisable(b->fail);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
}

void interrupt(budget *b, uint32_t number)
{
    PyObject *argument = PyLong_FromUnsignedLong(number), *result = NULL;
    if (argument)
        result = PyObject_CallFunctionObjArgs(b->interrupt, argument, NULL);
    if (!result)
        failed(b);
    Py_XDECREF(result);
    Py_XDECREF(argument);
}

/* What a method of the port says to some numbers; null: it raised. */
static PyObject *ask(budget *b, enum question which, int count, const uint64_t *values)
{
    PyObject *n[MOST_NUMBERS + 1] = {NULL}, *answer = NULL;
    int made = 0;
    while (made < count && (n[made] = PyLong_FromUnsignedLongLong(values[made])))
        made++;
    if (made == count)
        answer = PyObject_CallMethodObjArgs(b->port, questions[which], n[0], n[1], n[2], n[3], n[4], n[5], NULL);
    while (made--)
        Py_DECREF(n[made]);
    if (!answer)
        failed(b);
    return answer;
}

/* An answer as a number, whether it is one. */
static bool number_of(budget *b, PyObject *answer, uint64_t *value)
{
    *value = 0;
    if (!answer)
        return false;
    *value = PyLong_AsUnsignedLongLongMask(answer);
    Py_DECREF(answer);
    if (!PyErr_Occurred())
        return true;
    failed(b);
    *value = 0;
    return false;
}

static bool carry_cpuid(budget *b)
{
    PyObject *answer = ask(b, ON_CPUID, 2, (uint64_t[]){(uint32_t)b->regs[0], (uint32_t)b->regs[1]});
    unsigned long long eax, ebx, ecx, edx;
    bool good = answer && PyArg_ParseTuple(answer, "KKKK", &eax, &ebx, &ecx, &edx);
    if (good)
        b->regs[0] = eax, b->regs[1] = ecx, b->regs[2] = edx, b->regs[3] = ebx;
    else if (answer)
        failed(b);
    Py_XDECREF(answer);
    return good;
}

static bool carry_rdmsr(budget *b)
{
    PyObject *answer = ask(b, ON_RDMSR, 1, (uint64_t[]){(uint32_t)b->regs[1]});
    uint64_t value;
    if (answer == Py_None) { /* a fault */
        Py_DECREF(answer);
        return false;
    }
    if (!number_of(b, answer, &value))
        return false;
    b->regs[0] = (uint32_t)value;
    b->regs[2] = value >> 32;
    return true;
}

static bool carry_wrmsr(budget *b)
{
    PyObject *answer =
        ask(b, ON_WRMSR, 2, (uint64_t[]){(uint32_t)b->regs[1], b->regs[2] << 32 | (uint32_t)b->regs[0]});
    Py_XDECREF(answer);
    return answer == Py_True;
}

static bool carry_hypercall(budget *b)
{
    static const int arguments[] = {0, 3, 1, 2, 6}; /* RAX, RBX, RCX, RDX, RSI */
    uint64_t cut = *b->hflags & CS64 ? UINT64_MAX : UINT32_MAX, values[MOST_NUMBERS], result;
    for (int i = 0; i < 5; i++)
        values[i] = b->regs[arguments[i]] & cut;
    values[5] = *b->hflags & CPL;
    if (!number_of(b, ask(b, ON_HYPERCALL, MOST_NUMBERS, values), &result))
        return false;
    b->regs[0] = result & cut;
    return true;
}

bool carry(budget *b, void *uc, uint32_t number)
{
    PyGILState_STATE state;
    bool (*how)(budget *), answered;
    uint32_t code = b->code & 0xffffff, low = code & 0xffff, msr = (uint32_t)b->regs[1];
    if (*b->eflags & TF)
        return false;
    if (number == CPUID && low == 0xa20f)
        how = carry_cpuid;
    else if (number == MSR && low == 0x320f && msr != EFER)
        how = carry_rdmsr;
    else if (number == MSR && low == 0x300f && msr != EFER) /* which changes more than a register */
        how = carry_wrmsr;
    else if (number == UNDEFINED && (code == 0xc1010f || code == 0xd9010f))
        how = carry_hypercall;
    else
        return false;
    b->cells[0] += b->exit_cost;
    state = PyGILState_Ensure();
    answered = how(b);
    if (!answered)
        interrupt(b, FAULTED);
    PyGILState_Release(state);
    if (answered)
        done(b, uc, how == carry_hypercall ? 3 : 2);
    else
        settle(b, uc);
    return true;
}

/* The instruction's end is another than the core's: the slice ends behind it, or an interrupt comes there. */
static void behind_io(budget *b, uint32_t port, int is_out)
{
    PyObject *result = PyObject_CallFunction(b->behind_io, "Ii", port, is_out);
    if (!result)
        failed(b);
    Py_XDECREF(result);
}

static uint64_t cut(uint64_t value, unsigned size)
{
    return size < 8 ? value & (((uint64_t)1 << 8 * size) - 1) : value;
}

/* IN, and each element of INS. Code that is not at CPL 0 needs a permission. */
uint32_t on_in(void *uc, uint32_t port, int size, void *data)
{
    budget *b = data;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *answer;
    uint64_t value;
    (void)uc;
    b->cells[0] += b->exit_cost;
    if (*b->hflags & CPL) {
        answer = PyObject_CallFunction(b->port_in, "Ii", port, size);
        if (!answer)
            failed(b);
        number_of(b, answer, &value);
    } else {
        number_of(b, ask(b, ON_IN, 2, (uint64_t[]){port, size}), &value);
        if (over(b))
            behind_io(b, port, 0);
    }
    PyGILState_Release(state);
    return (uint32_t)cut(value, size);
}

void on_out(void *uc, uint32_t port, int size, uint32_t value, void *data)
{
    budget *b = data;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *answer;
    (void)uc;
    b->cells[0] += b->exit_cost;
    if (*b->hflags & CPL) {
        answer = PyObject_CallFunction(b->port_out, "IiI", port, size, value);
        if (!answer)
            failed(b);
    } else {
        answer = ask(b, ON_OUT, 3, (uint64_t[]){port, size, cut(value, size)});
        if (over(b) || *b->windows)
            behind_io(b, port, 1);
    }
    Py_XDECREF(answer);
    PyGILState_Release(state);
}

uint64_t on_mmio_read(void *uc, uint64_t offset, unsigned size, void *data)
{
    device_range *range = data;
    budget *b = range->budget;
    PyGILState_STATE state = PyGILState_Ensure();
    uint64_t value;
    (void)uc;
    b->cells[0] += b->exit_cost;
    number_of(b, ask(b, ON_MMIO_READ, 2, (uint64_t[]){range->base + offset, size}), &value);
    PyGILState_Release(state);
    return cut(value, size);
}

void on_mmio_write(void *uc, uint64_t offset, unsigned size, uint64_t value, void *data)
{
    device_range *range = data;
    budget *b = range->budget;
    PyGILState_STATE state = PyGILState_Ensure();
    (void)uc;
    b->cells[0] += b->exit_cost;
    Py_XDECREF(ask(b, ON_MMIO_WRITE, 3, (uint64_t[]){range->base + offset, size, cut(value, size)}));
    PyGILState_Release(state);
}
