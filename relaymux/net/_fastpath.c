/*
 * The fast path: bulk between local sockets and a link, without Python for each turn.
 *
 * Python touches a quarter of a megabyte of memory in a turn, which takes the place of the
 * kernel's in the processor's caches.  So while nothing but bulk moves, what it would do in
 * a turn is done here: DATA frames out of local sockets and into them, ACK and CREDIT for
 * them.  Whatever else there is ends that, and Python finds everything as if it had done it
 * itself.  docs/decisions/0029-a-fast-path-for-bulk.md has the whole story.
 *
 * Here it waits.  _fastpath_lease.c has what it waits for, _fastpath_send.c and
 * _fastpath_receive.c what is done then, and _fastpath_pages.c how to do it without a copy.
 */

#include "_fastpath.h"

#include <errno.h>
#include <math.h>
#include <sched.h>
#include <sys/epoll.h>
#include <time.h>

#define MOST_EVENTS 64

/* Seconds after which who had the processor meanwhile has more to do than to give a lease something to carry. */
#define LONG_YIELD 0.001

/*
 * Seconds to wait for a local socket that is full.  Nothing is read of the link meanwhile, and somebody else may have
 * something there.
 */
#define FULL_SECONDS 0.002

/* What is in use by a call of wait(), as others say 1. */
#define BY_LEASES 2

/* Whether there is such a call: a cipher may release the GIL, and another thread come by. */
static int carrying;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Have one of the leases take care of an event.  Returns whether one did; -1 with an exception. */
static int carry(PyObject *leases, const struct epoll_event *event)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        if (lease->over)
            continue;
        if (event->data.fd == lease->fd) {
            /* Python may have asked whether it takes something, too. */
            if (event->events & ~(lease->blocked ? EPOLLIN | EPOLLOUT : EPOLLIN))
                return 0;
            if (event->events & EPOLLOUT && link_takes(lease))
                return -1;
            int reads = event->events & EPOLLIN && !lease->full && !lease->over;
            return reads && from_link(lease) ? -1 : 1;
        }
        for (int j = 0; j < lease->stream_count; j++) {
            Stream *stream = &lease->streams[j];
            if (event->data.fd != stream->fd)
                continue;
            if (!stream->reads || event->events & ~(stream == lease->full ? EPOLLIN | EPOLLOUT : EPOLLIN))
                return 0;
            if (event->events & EPOLLOUT && local_takes(lease))
                return -1;
            return event->events & EPOLLIN && !lease->over && from_local(lease, stream) ? -1 : 1;
        }
    }
    return 0;
}

static int any_over(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        if (((Lease *)PyList_GET_ITEM(leases, i))->over)
            return 1;
    return 0;
}

static int say_late_acks(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        if (say_late_ack((Lease *)PyList_GET_ITEM(leases, i)))
            return -1;
    return 0;
}

/* Have epoll watch what Python's reactor believes that it watches. */
static void restore(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        Stream *full = lease->full;
        int blocked = lease->blocked;
        lease->over = 1;
        lease->full = NULL;
        lease->blocked = 0;
        if (full)
            watch_local(lease, full);
        if (full || blocked)
            watch_link(lease);
        for (int j = 0; j < lease->stream_count; j++)
            if (lease->streams[j].held)
                release(lease, &lease->streams[j]);
    }
}

/*
 * While bytes are carried nobody else, as a finaliser or another thread may be, is to take away the buffer that
 * is filled, or to use the keys.  Leases share pools: each of them is claimed once.
 */
static int claim(int *in_use)
{
    if (*in_use && *in_use != BY_LEASES) {
        PyErr_SetString(PyExc_RuntimeError, "in use by a call that has not returned");
        return -1;
    }
    *in_use = BY_LEASES;
    return 0;
}

static void unclaim(int *in_use)
{
    if (*in_use == BY_LEASES)
        *in_use = 0;
}

static void end_carrying(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        unclaim(&lease->pool->in_use);
        if (!lease->sealer)
            continue;
        unclaim(&lease->ciphers->in_use);
        unclaim(records_in_use(lease->sealer));
        unclaim(records_in_use(lease->opener));
    }
    carrying = 0;
}

static int begin_carrying(PyObject *leases)
{
    if (carrying) {
        PyErr_SetString(PyExc_RuntimeError, "leases are carried by a call that has not returned");
        return -1;
    }
    carrying = 1;
    int failed = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases) && !failed; i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        failed = claim(&lease->pool->in_use) ||
                 (lease->sealer && (claim(&lease->ciphers->in_use) || claim(records_in_use(lease->sealer)) ||
                                    claim(records_in_use(lease->opener))));
    }
    if (failed)
        end_carrying(leases);
    return failed ? -1 : 0;
}

/* Those whose socket has been full for too long are over. */
static void end_full(PyObject *leases, double now)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        if (lease->full && !lease->full_until)
            lease->full_until = now + FULL_SECONDS;
        else if (lease->full && now >= lease->full_until)
            lease->over = 1;
    }
}

/* The earliest of `until` and the times at which end_full() ends a lease. */
static double first_end(PyObject *leases, double until)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++) {
        Lease *lease = (Lease *)PyList_GET_ITEM(leases, i);
        if (lease->full && lease->full_until < until)
            until = lease->full_until;
    }
    return until;
}

static int any_send_pages(PyObject *leases)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        if (((Lease *)PyList_GET_ITEM(leases, i))->sends_pages)
            return 1;
    return 0;
}

/*
 * Let others have the processor that have something to do: where pages are passed on it is calls and wake-ups that
 * cost time, and who fills or empties the sockets meanwhile makes fewer of them do.  Moves `*now` on.  Returns whether
 * that is good to repeat: a program that never waits would take what the scheduler gives it, several milliseconds
 * each time.
 */
static int yield(double *now)
{
    double before = *now;
    Py_BEGIN_ALLOW_THREADS
    sched_yield();
    Py_END_ALLOW_THREADS
    *now = seconds();
    return *now - before < LONG_YIELD;
}

static PyObject *fast_wait(PyObject *module, PyObject *args)
{
    int epoll;
    double timeout, longest, ack_delay;
    PyObject *leases;
    if (!PyArg_ParseTuple(args, "idddO!:wait", &epoll, &timeout, &longest, &ack_delay, &PyList_Type, &leases))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        if (!Py_IS_TYPE(PyList_GET_ITEM(leases, i), &LeaseType)) {
            PyErr_SetString(PyExc_TypeError, "wait() takes a list of leases");
            return NULL;
        }
    PyObject *others = PyList_New(0);
    if (!others)
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leases); i++)
        ((Lease *)PyList_GET_ITEM(leases, i))->waits = 1;
    double now = seconds(), until = now + (timeout >= 0 && timeout < longest ? timeout : longest);
    double remind = now + ack_delay;
    int failed = 0, yields = any_send_pages(leases);
    for (int looks = 0; !failed && !PyList_GET_SIZE(others) && !any_over(leases); looks = 1) {
        struct epoll_event events[MOST_EVENTS];
        if (looks && yields)
            yields = yield(&now);
        if (now > until && looks)
            break; /* not before there was one look: with no time at all there may be events */
        double next = first_end(leases, until < remind ? until : remind), left = next - now;
        int count;
        Py_BEGIN_ALLOW_THREADS
        count = epoll_wait(epoll, events, MOST_EVENTS, left > 0 ? (int)ceil(left * 1000) : 0);
        Py_END_ALLOW_THREADS
        if (count < 0) {
            if (errno != EINTR)
                PyErr_SetFromErrno(PyExc_OSError);
            failed = errno != EINTR || PyErr_CheckSignals();
            break;
        }
        if (!count && next == until)
            break;
        if (begin_carrying(leases)) {
            failed = 1;
            break;
        }
        for (int i = 0; i < count && !failed; i++) {
            int done = carry(leases, &events[i]);
            if (!done) {
                PyObject *event = Py_BuildValue("(iI)", events[i].data.fd, events[i].events);
                done = event ? PyList_Append(others, event) : -1;
                Py_XDECREF(event);
            }
            failed = done < 0;
        }
        now = seconds();
        end_full(leases, now);
        if (!failed && now >= remind) {
            remind = now + ack_delay;
            failed = say_late_acks(leases);
        }
        end_carrying(leases);
    }
    restore(leases);
    if (failed)
        Py_CLEAR(others);
    return others;
}

static PyMethodDef functions[] = {
    {"wait", fast_wait, METH_VARARGS, NULL},
    {NULL},
};

int add_fastpath(PyObject *module)
{
    if (PyType_Ready(&LeaseType) || PyType_Ready(&PagesType) || PyModule_AddFunctions(module, functions) ||
        PyModule_AddObjectRef(module, "Pages", (PyObject *)&PagesType))
        return -1;
    return PyModule_AddObjectRef(module, "Lease", (PyObject *)&LeaseType);
}
