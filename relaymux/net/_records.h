/* TLS 1.3 records: what their making (_sealing.c) and their reading (_opening.c) share. */

#ifndef RELAYMUX_RECORDS_H
#define RELAYMUX_RECORDS_H

#include "_native.h"

/* The most that one record holds, its header, and what encryption adds: a type and a tag. */
#define RECORD 16384
#define HEADER 5
#define TAG 16
#define SEALED_RECORD (HEADER + RECORD + 1 + TAG)

/* The most that a record may have behind its header (5.2). */
#define CIPHERTEXT (RECORD + 256)

#define NONCE 12

/* Shows a cipher whatever memory its owner points it at, so that no record needs objects of its own. */
typedef struct {
    PyObject_HEAD
    void *memory;
    Py_ssize_t length;
    Py_ssize_t shown;
} Window;

/* The arguments of a cipher, in their order. */
enum { THE_NONCE, THE_INPUT, THE_HEADER, THE_OUTPUT, ARGUMENTS };

/* The records of one direction under one key. */
struct Records {
    PyObject_HEAD
    PyObject *cipher; /* what encrypts or decrypts into given memory */
    Window *windows[ARGUMENTS];
    unsigned char iv[NONCE], nonce[NONCE];
    unsigned long long records;
    /* Of a Sealer: the plain bytes of the next record.  Of an Opener: a record that is not complete. */
    int filled;
    int in_use; /* by a call that has not returned: a cipher may release the GIL */
    unsigned char record[HEADER + CIPHERTEXT];
};

/* _records.c */
int protect(Records *records, void *header, void *input, Py_ssize_t input_length, void *output,
            Py_ssize_t output_length);
int begin_records(Records *records, Pool *pool);
PyObject *end_records(Records *records, Pool *pool, PyObject *result);
Pool *pool_argument(PyObject *argument);

/* What Python calls. */
PyObject *sealer_seal(Records *records, PyObject *const *args, Py_ssize_t nargs);
PyObject *opener_open(Records *records, PyObject *const *args, Py_ssize_t nargs);

#endif
