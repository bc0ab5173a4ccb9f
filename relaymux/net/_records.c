/*
 * TLS 1.3 records (RFC 8446, 5.2), which a cipher of Python's encrypts and decrypts: what costs per record.
 *
 * A cipher may release the GIL (that of pyca/cryptography does), so nothing that other threads look at may
 * be in a pool's buffers while records are sealed: see `in_use`.
 *
 * Here are the keys; _sealing.c makes records, _opening.c reads them.
 */

#include "_records.h"

#include <string.h>

static int window_getbuffer(Window *window, Py_buffer *view, int flags)
{
    if (PyBuffer_FillInfo(view, (PyObject *)window, window->memory, window->length, 0, flags))
        return -1;
    window->shown++;
    return 0;
}

static void window_releasebuffer(Window *window, Py_buffer *view)
{
    window->shown--;
}

static PyBufferProcs window_buffer = {
    .bf_getbuffer = (getbufferproc)window_getbuffer,
    .bf_releasebuffer = (releasebufferproc)window_releasebuffer,
};

static PyTypeObject WindowType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Window",
    .tp_basicsize = sizeof(Window),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_as_buffer = &window_buffer,
};

static void records_dealloc(Records *records)
{
    Py_CLEAR(records->cipher);
    for (int i = 0; i < ARGUMENTS; i++)
        Py_CLEAR(records->windows[i]);
    Py_TYPE(records)->tp_free(records);
}

static PyObject *records_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *cipher;
    const char *iv;
    Py_ssize_t iv_length;
    unsigned long long sent = 0;
    if (!PyArg_ParseTuple(args, "Oy#|K", &cipher, &iv, &iv_length, &sent))
        return NULL;
    if (iv_length != NONCE) {
        PyErr_Format(PyExc_ValueError, "%zd bytes where the nonce has %d", iv_length, NONCE);
        return NULL;
    }
    Records *records = (Records *)type->tp_alloc(type, 0);
    if (!records)
        return NULL;
    records->cipher = Py_NewRef(cipher);
    records->records = sent;
    memcpy(records->iv, iv, NONCE);
    for (int i = 0; i < ARGUMENTS; i++) {
        Window *window = records->windows[i] = PyObject_New(Window, &WindowType);
        if (!window) {
            Py_DECREF(records);
            return NULL;
        }
        window->memory = NULL;
        window->length = window->shown = 0;
    }
    records->windows[THE_NONCE]->memory = records->nonce;
    records->windows[THE_NONCE]->length = NONCE;
    records->windows[THE_HEADER]->length = HEADER;
    return (PyObject *)records;
}

static PyObject *records_count(Records *records, void *closure)
{
    return PyLong_FromUnsignedLongLong(records->records);
}

/*
 * Encrypt or decrypt one record; its header is the additional data (5.2), and its number
 * makes the nonce (5.3).  -1 with an exception.
 */
int protect(Records *records, void *header, void *input, Py_ssize_t input_length, void *output,
            Py_ssize_t output_length)
{
    memcpy(records->nonce, records->iv, NONCE);
    unsigned long long number = records->records++;
    for (int i = NONCE - 1; number; i--, number >>= 8)
        records->nonce[i] ^= (unsigned char)number;
    Window **windows = records->windows;
    windows[THE_HEADER]->memory = header;
    windows[THE_INPUT]->memory = input;
    windows[THE_INPUT]->length = input_length;
    windows[THE_OUTPUT]->memory = output;
    windows[THE_OUTPUT]->length = output_length;
    PyObject *count = PyObject_Vectorcall(records->cipher, (PyObject **)windows, ARGUMENTS, NULL);
    if (!count)
        return -1;
    Py_ssize_t done = PyLong_AsSsize_t(count);
    Py_DECREF(count);
    if (done == -1 && PyErr_Occurred())
        return -1;
    if (done != output_length || windows[THE_INPUT]->shown || windows[THE_OUTPUT]->shown) {
        PyErr_SetString(PyExc_RuntimeError, "the cipher did not do as it should, or keeps what it was shown");
        return -1;
    }
    return 0;
}

/* For who makes or reads records by other calls than Python's. */
int *records_in_use(Records *records)
{
    return &records->in_use;
}

int begin_records(Records *records, Pool *pool)
{
    if (records->in_use) {
        PyErr_SetString(PyExc_RuntimeError, "records are being made or read by a call that has not returned");
        return -1;
    }
    if (begin_use(pool))
        return -1;
    records->in_use = 1;
    return 0;
}

PyObject *end_records(Records *records, Pool *pool, PyObject *result)
{
    records->in_use = 0;
    return end_use(pool, result);
}

Pool *pool_argument(PyObject *argument)
{
    if (Py_IS_TYPE(argument, &PoolType)) {
        Pool *pool = (Pool *)argument;
        return check_minimum(pool, HEADER + CIPHERTEXT) ? NULL : pool;
    }
    PyErr_SetString(PyExc_TypeError, "the first argument has to be a BufferPool of this module");
    return NULL;
}

static PyGetSetDef records_attributes[] = {
    {"records", (getter)records_count, NULL, NULL, NULL},
    {NULL},
};

static PyMethodDef sealer_methods[] = {
    {"seal", (PyCFunction)(void (*)(void))sealer_seal, METH_FASTCALL, NULL},
    {NULL},
};

static PyMethodDef opener_methods[] = {
    {"open", (PyCFunction)(void (*)(void))opener_open, METH_FASTCALL, NULL},
    {NULL},
};

/* What the other two have in common; nobody makes one of its own. */
static PyTypeObject RecordsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Records",
    .tp_basicsize = sizeof(Records),
    .tp_new = records_new,
    .tp_dealloc = (destructor)records_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_getset = records_attributes,
};

PyTypeObject SealerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Sealer",
    .tp_base = &RecordsType,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = sealer_methods,
};

PyTypeObject OpenerType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Opener",
    .tp_base = &RecordsType,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = opener_methods,
};

int add_records(PyObject *module)
{
    if (PyType_Ready(&WindowType) || PyType_Ready(&RecordsType) || PyType_Ready(&SealerType) ||
        PyType_Ready(&OpenerType))
        return -1;
    return PyModule_AddObjectRef(module, "Sealer", (PyObject *)&SealerType) ||
                   PyModule_AddObjectRef(module, "Opener", (PyObject *)&OpenerType)
               ? -1
               : 0;
}
