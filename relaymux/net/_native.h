/* What the parts of relaymux.net._native share: the pool of receive buffers. */

#ifndef RELAYMUX_NATIVE_H
#define RELAYMUX_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/*
 * The memory of a pool.  Buffers that are lent may outlive the pool, so whoever goes
 * last frees it.
 */
typedef struct {
    Py_ssize_t owners; /* the pool, as long as there is one, and each lent buffer */
    Py_ssize_t size;   /* bytes of each buffer */
    Py_ssize_t lent;
    Py_ssize_t idle;
    Py_ssize_t least_idle; /* so many are kept in any case */
    int has_pool;
    Py_ssize_t places; /* of `free` */
    char **free; /* the idle ones; the last one returned is the first used again */
} Store;

/* A buffer that is lent: lives as long as any view of it does, and then goes back. */
typedef struct {
    PyObject_HEAD
    Store *store;
    char *memory;
    /* What the view shows that is being made; else all of it. */
    Py_ssize_t start, length;
    int readonly;
} Lent;

typedef struct {
    PyObject_HEAD
    Store *store;
    Lent *current; /* NULL before the first, and when there was no memory for another */
    Py_ssize_t filled;
    int in_use; /* by a call that has not returned */
} Pool;

/* Bytes in memory that `owner` keeps. */
typedef struct {
    PyObject *owner; /* a Lent, or a memoryview; NULL for memory that lasts longer than the piece */
    char *memory;
    Py_ssize_t length;
} Piece;

/* What is written at once may be in so many pieces. */
#define MOST_PIECES 12

typedef struct {
    Piece piece[MOST_PIECES];
    int count;
    Py_ssize_t length;
} Pieces;

/* Where a call puts its results: rooms of a pool one after the other, and what they hold. */
typedef struct {
    Pool *pool;
    PyObject *views; /* a list, for Python; or */
    Pieces *pieces;
    char *room;
    Py_ssize_t length, filled;
} Output;

extern PyTypeObject LentType, PoolType;

/* _native.c says what they do. */
int begin_use(Pool *pool);
PyObject *end_use(Pool *pool, PyObject *result);
PyObject *view_of(Lent *lent, Py_ssize_t start, Py_ssize_t length, int readonly);
char *room_in(Pool *pool, Py_ssize_t minimum, Py_ssize_t *length);
int check_minimum(Pool *pool, Py_ssize_t minimum);
unsigned char *output_room(Output *output, Py_ssize_t minimum);
int output_take(Output *output);
int input_end(ssize_t count);
Py_ssize_t gather(Output *output, int fd, Py_ssize_t limit, Py_ssize_t minimum, Py_ssize_t again, int *ended);

/* _pieces.c */
void drop(Pieces *pieces);
int append(Pieces *pieces, PyObject *owner, char *memory, Py_ssize_t length);
int append_buffer(PyObject *list, const Piece *piece);
int append_buffers(PyObject *list, const Pieces *pieces);
PyObject *as_list(const Pieces *pieces);
Py_ssize_t put(int fd, Pieces *pieces, int *error);

/* _records.c */
#define APPLICATION_DATA 23 /* a kind of record (RFC 8446, B.1) */

typedef struct Records Records;

/* A record that is no application data: what it is, and what it says; or the alert for one that may not be. */
typedef struct {
    int alert, type;
    PyObject *message;
} Odd;

extern PyTypeObject SealerType, OpenerType;

int *records_in_use(Records *records);
int seal(Records *sealer, const Pieces *plain, int type, Output *output);
int open_records(Records *opener, PyObject *wrong_tag, char *data, Py_ssize_t length, Py_ssize_t *used,
                 Output *output, Odd *odd);

/* Each part adds its own to the module; -1 with an exception. */
int add_records(PyObject *module);
int add_fastpath(PyObject *module);

#endif
