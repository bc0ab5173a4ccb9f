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
    Py_ssize_t most_idle;
    int has_pool;
    char *free[]; /* the idle ones; the last one returned is the first used again */
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

/* Where a call puts its results: rooms of a pool one after the other, and views of what they hold. */
typedef struct {
    Pool *pool;
    PyObject *views;
    char *room;
    Py_ssize_t length, filled;
} Output;

extern PyTypeObject LentType, PoolType;

/* _native.c says what they do. */
int begin_use(Pool *pool);
PyObject *end_use(Pool *pool, PyObject *result);
PyObject *view_of(Lent *lent, Py_ssize_t start, Py_ssize_t length, int readonly);
char *room_in(Pool *pool, Py_ssize_t minimum, Py_ssize_t *length);
int take_into(Pool *pool, Py_ssize_t count, PyObject *list);
int check_minimum(Pool *pool, Py_ssize_t minimum);
unsigned char *output_room(Output *output, Py_ssize_t minimum);

/* Each part adds its own to the module; -1 with an exception. */
int add_records(PyObject *module);
int add_fastpath(PyObject *module);

#endif
