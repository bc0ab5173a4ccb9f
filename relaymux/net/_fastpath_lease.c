/*
 * A Lease: a link and its streams for the time in which Python leaves them alone.
 *
 * relaymux/net/fastpath.py makes it, when nothing else waits to be said or done, and
 * settles it: takes the counters, and what is not sent, delivered or understood.
 */

#include "_fastpath.h"

#include <errno.h>
#include <sys/epoll.h>

static void lease_dealloc(Lease *lease)
{
    for (int i = 0; i < lease->sent_count; i++)
        drop(&lease->sent[(lease->first + i) % MOST_SENT].payload);
    for (int i = 0; i < lease->stream_count; i++)
        drop(&lease->streams[i].untaken);
    drop(&lease->unsent);
    drop(&lease->payload);
    Py_XDECREF(lease->left);
    Py_XDECREF(lease->unread);
    Py_XDECREF(lease->odd.message);
    Py_XDECREF(lease->wrong_tag);
    Py_XDECREF(lease->ciphers);
    Py_XDECREF(lease->opener);
    Py_XDECREF(lease->sealer);
    Py_XDECREF(lease->pages);
    Py_XDECREF(lease->pool);
    PyMem_Free(lease->sent);
    PyMem_Free(lease->ends);
    PyMem_Free(lease->streams);
    Py_TYPE(lease)->tp_free(lease);
}

static PyObject *lease_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *pool, *ends;
    int fd, epoll, places;
    unsigned long long end, acknowledged, most_held, rx_next, rx_acknowledged, ack_bytes;
    long long room;
    Py_ssize_t frame_cost, local_turn, link_turn;
    unsigned int max_payload;
    if (!PyArg_ParseTuple(args, "O!ii(KKLKnO!)(KKKI)(nn)i", &PoolType, &pool, &fd, &epoll, &end,
                          &acknowledged, &room, &most_held, &frame_cost, &PyList_Type, &ends, &rx_next,
                          &rx_acknowledged, &ack_bytes, &max_payload, &local_turn, &link_turn, &places))
        return NULL;
    /* So large that each read that is followed by another one leaves a long piece: see MOST_TURN. */
    if (check_minimum((Pool *)pool, 2 * READ_ROOM))
        return NULL;
    Lease *lease = (Lease *)type->tp_alloc(type, 0);
    if (!lease)
        return NULL;
    lease->pool = (Pool *)Py_NewRef(pool);
    lease->fd = fd;
    lease->epoll = epoll;
    lease->end = lease->settled_end = end;
    lease->acknowledged = acknowledged;
    lease->room = room;
    lease->most_held = most_held;
    lease->frame_cost = frame_cost;
    lease->local_turn = local_turn < MOST_TURN ? local_turn : MOST_TURN;
    lease->link_turn = link_turn < MOST_TURN ? link_turn : MOST_TURN;
    lease->rx_next = rx_next;
    lease->rx_acknowledged = rx_acknowledged;
    lease->rx_reminded = UINT64_MAX; /* what had arrived before is no older than the lease */
    lease->ack_bytes = ack_bytes;
    lease->max_payload = max_payload;
    lease->places = places < 0 ? 0 : places > MOST_STREAMS ? MOST_STREAMS : places;
    lease->sent = PyMem_Malloc(MOST_SENT * sizeof(Sent));
    lease->streams = PyMem_Malloc((lease->places + 1) * sizeof(Stream));
    lease->ends = PyMem_Malloc((PyList_GET_SIZE(ends) + 1) * sizeof(uint64_t));
    if (!lease->sent || !lease->streams || !lease->ends) {
        Py_DECREF(lease);
        return PyErr_NoMemory();
    }
    for (; lease->end_count < PyList_GET_SIZE(ends); lease->end_count++)
        lease->ends[lease->end_count] = PyLong_AsUnsignedLongLong(PyList_GET_ITEM(ends, lease->end_count));
    if (PyErr_Occurred()) {
        Py_DECREF(lease);
        return NULL;
    }
    return (PyObject *)lease;
}

static PyObject *lease_encrypt(Lease *lease, PyObject *args)
{
    PyObject *sealer, *opener, *ciphers, *wrong_tag;
    if (!PyArg_ParseTuple(args, "O!O!O!O:encrypt", &SealerType, &sealer, &OpenerType, &opener, &PoolType,
                          &ciphers, &wrong_tag))
        return NULL;
    if (lease->sealer || lease->pages) {
        PyErr_SetString(PyExc_RuntimeError, "it is encrypted, or has pages passed on");
        return NULL;
    }
    /* Of what is read, and of a frame that is encrypted, there are few pieces then. */
    if (check_minimum((Pool *)ciphers, MOST_TURN / 2))
        return NULL;
    lease->sealer = (Records *)Py_NewRef(sealer);
    lease->opener = (Records *)Py_NewRef(opener);
    lease->ciphers = (Pool *)Py_NewRef(ciphers);
    lease->wrong_tag = Py_NewRef(wrong_tag);
    Py_RETURN_NONE;
}

static PyObject *lease_pass_on(Lease *lease, PyObject *args)
{
    Pages *pages;
    Py_ssize_t link_turn;
    unsigned long long ack_bytes;
    int sends;
    if (!PyArg_ParseTuple(args, "O!nKp:pass_on", &PagesType, &pages, &link_turn, &ack_bytes, &sends))
        return NULL;
    if (link_turn < 1) {
        PyErr_SetString(PyExc_ValueError, "nothing can be read in such a turn");
        return NULL;
    }
    if (lease->sealer || lease->pages || pages->is_lent) {
        PyErr_SetString(PyExc_RuntimeError, "it is encrypted, has pages, or another lease has these");
        return NULL;
    }
    if (pages_open(pages)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return NULL;
    }
    lease->sends_pages = sends;
    lease->pages = (Pages *)Py_NewRef(pages);
    lease->link_turn = link_turn;
    lease->ack_bytes = ack_bytes;
    Py_RETURN_NONE;
}

static PyObject *lease_add(Lease *lease, PyObject *args)
{
    unsigned int id;
    int fd, reads, writes, queued;
    unsigned long long sent, limit, delivered, received, consumed, granted, size, step;
    if (!PyArg_ParseTuple(args, "Iippp(KKK)(KKKKK):add", &id, &fd, &reads, &writes, &queued, &sent, &limit,
                          &delivered, &received, &consumed, &granted, &size, &step))
        return NULL;
    if (lease->stream_count == lease->places)
        Py_RETURN_FALSE;
    lease->streams[lease->stream_count++] = (Stream){
        .id = id,
        .fd = fd,
        .reads = reads,
        .writes = writes,
        .others = queued ? EPOLLOUT : 0,
        .sent = sent,
        .sent_before = sent,
        .limit = limit,
        .delivered = delivered,
        .received = received,
        .received_before = received,
        .consumed = consumed,
        .consumed_before = consumed,
        .granted = granted,
        .size = size,
        .step = step,
    };
    Py_RETURN_TRUE;
}

static PyObject *lease_owe(Lease *lease, PyObject *buffers)
{
    PyObject *list = PySequence_Fast(buffers, "owe() takes a sequence");
    if (!list)
        return NULL;
    int failed = lease->blocked || PySequence_Fast_GET_SIZE(list) > MOST_PIECES - 1, error = 0;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list) && !failed && !error; i++) {
        PyObject *view = PyMemoryView_FromObject(PySequence_Fast_GET_ITEM(list, i));
        if (!view) {
            error = 1;
            break;
        }
        Py_buffer *whole = PyMemoryView_GET_BUFFER(view);
        failed = append(&lease->unsent, view, whole->buf, whole->len);
        Py_DECREF(view);
    }
    Py_DECREF(list);
    if (error)
        return NULL;
    if (failed) {
        drop(&lease->unsent);
        Py_RETURN_FALSE;
    }
    if (lease->unsent.count) {
        lease->blocked = 1;
        watch_link(lease);
    }
    Py_RETURN_TRUE;
}

static PyObject *lease_feed(Lease *lease, PyObject *buffers)
{
    PyObject *list = PySequence_Fast(buffers, "feed() takes a sequence");
    if (!list) {
        lease->read_end = EIO;
        return NULL;
    }
    int failed = 0;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list) && !failed; i++) {
        PyObject *view = PyMemoryView_FromObject(PySequence_Fast_GET_ITEM(list, i));
        if (!view) {
            failed = -1;
            break;
        }
        Py_buffer *whole = PyMemoryView_GET_BUFFER(view);
        Piece piece = {view, whole->buf, whole->len};
        if (lease->left)
            failed = PyList_Append(lease->left, view);
        else
            failed = take_in(lease, &piece);
        Py_DECREF(view);
    }
    Py_DECREF(list);
    deliver_all(lease);
    if (failed) {
        lease->over = 1;
        lease->read_end = EIO; /* as in from_link() */
        return NULL;
    }
    return PyBool_FromLong(!lease->over);
}

/* Append the first `*length` bytes of a pipe to a list.  -1 with an exception. */
static int append_pages(Lease *lease, PyObject *list, const Pipe *pipe, Py_ssize_t *length)
{
    Output output = {.pool = lease->pool, .views = list};
    return *length ? pages_copy(pipe, length, &output) : 0;
}

/* One stream's part of what settle() returns. */
static PyObject *stream_result(Lease *lease, const Stream *stream)
{
    PyObject *untaken = as_list(&stream->untaken);
    if (!untaken)
        return NULL;
    if (stream == lease->whole_stream && append_pages(lease, untaken, &lease->pages->in, &lease->whole)) {
        Py_DECREF(untaken);
        return NULL;
    }
    return Py_BuildValue("(IKKKKKKNii)", stream->id, (unsigned long long)(stream->sent - stream->sent_before),
                         (unsigned long long)stream->limit, (unsigned long long)stream->delivered,
                         (unsigned long long)(stream->received - stream->received_before),
                         (unsigned long long)(stream->consumed - stream->consumed_before),
                         (unsigned long long)stream->granted, untaken, stream->read_end, stream->write_end);
}

/* Append what is stored of a frame.  -1 with an exception. */
static int append_stored(Lease *lease, PyObject *list, Sent *sent)
{
    Output output = {.pool = lease->pool, .views = list};
    return pages_unstore(lease->pages, &sent->useless, NULL) ||
           pages_unstore(lease->pages, &sent->stored, &output) ? -1 : 0;
}

static PyObject *sent_result(Lease *lease, Sent *sent)
{
    PyObject *buffers = PyList_New(0);
    if (!buffers)
        return NULL;
    PyObject *head = PyBytes_FromStringAndSize((char *)sent->head, sent->head_length);
    if (!head || PyList_Append(buffers, head) || append_buffers(buffers, &sent->payload) ||
        (sent->stored && append_stored(lease, buffers, sent))) {
        Py_XDECREF(head);
        Py_DECREF(buffers);
        return NULL;
    }
    Py_DECREF(head);
    return Py_BuildValue("(KN)", (unsigned long long)sent->end, buffers);
}

/* The record that was no data, if one has ended the lease, and what has arrived behind it. */
static PyObject *odd_result(const Lease *lease)
{
    if (!lease->unread)
        Py_RETURN_NONE;
    const Odd *odd = &lease->odd;
    return Py_BuildValue("(iiOO)", odd->alert, odd->type, odd->message ? odd->message : Py_None, lease->unread);
}

/* Fill the lists that settle() returns.  -1 with an exception. */
static int fill(Lease *lease, PyObject *sent, PyObject *streams, PyObject *unsent)
{
    if (lease->lost) {
        PyErr_SetString(PyExc_RuntimeError, "bytes that a lease had taken are gone");
        return -1;
    }
    if (give_up_frame(lease) || append_buffers(unsent, &lease->unsent))
        return -1;
    if (lease->pages && (append_pages(lease, unsent, &lease->pages->out, &lease->leaving) ||
                         pages_unstore(lease->pages, &lease->forgotten, NULL)))
        return -1;
    for (int i = 0; i < lease->sent_count; i++) {
        PyObject *frame = sent_result(lease, &lease->sent[(lease->first + i) % MOST_SENT]);
        if (!frame || PyList_Append(sent, frame)) {
            Py_XDECREF(frame);
            return -1;
        }
        Py_DECREF(frame);
    }
    for (int i = 0; i < lease->stream_count; i++) {
        PyObject *stream = stream_result(lease, &lease->streams[i]);
        if (!stream || PyList_Append(streams, stream)) {
            Py_XDECREF(stream);
            return -1;
        }
        Py_DECREF(stream);
    }
    /* Behind what is whole. */
    return lease->pages ? append_pages(lease, lease->left, &lease->pages->in, &lease->arriving) : 0;
}

static PyObject *lease_settle(Lease *lease, PyObject *unused)
{
    if (lease->settled) {
        PyErr_SetString(PyExc_RuntimeError, "settled before");
        return NULL;
    }
    PyObject *sent = PyList_New(0), *streams = PyList_New(0), *unsent = PyList_New(0), *odd = NULL;
    if (!sent || !streams || !unsent || begin_use(lease->pool))
        goto fail;
    int failed = fill(lease, sent, streams, unsent);
    end_use(lease->pool, NULL);
    lease->lost |= failed && lease->pages; /* some of it is in lists that nobody gets */
    if (failed || !(odd = odd_result(lease)))
        goto fail;
    lease->settled = 1;
    if (lease->pages)
        lease->pages->is_lent = 0; /* nothing is in it any more */
    return Py_BuildValue("(KKKKNNOiNiK(NN))", (unsigned long long)lease->end,
                         (unsigned long long)lease->acknowledged,
                         (unsigned long long)lease->rx_next, (unsigned long long)lease->rx_acknowledged, sent,
                         unsent, lease->left, lease->read_end, streams, lease->write_end,
                         (unsigned long long)lease->carried, PyBool_FromLong(lease->hole), odd);
fail:
    Py_XDECREF(sent);
    Py_XDECREF(streams);
    Py_XDECREF(unsent);
    return NULL;
}

static PyMethodDef lease_methods[] = {
    {"encrypt", (PyCFunction)lease_encrypt, METH_VARARGS, NULL},
    {"pass_on", (PyCFunction)lease_pass_on, METH_VARARGS, NULL},
    {"add", (PyCFunction)lease_add, METH_VARARGS, NULL},
    {"owe", (PyCFunction)lease_owe, METH_O, NULL},
    {"feed", (PyCFunction)lease_feed, METH_O, NULL},
    {"settle", (PyCFunction)lease_settle, METH_NOARGS, NULL},
    {NULL},
};

PyTypeObject LeaseType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "relaymux.net._native.Lease",
    .tp_basicsize = sizeof(Lease),
    .tp_new = lease_new,
    .tp_dealloc = (destructor)lease_dealloc,
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_methods = lease_methods,
};
