# cython: language_level=3
# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: auto_pickle=False, embedsignature=True
"""The compiled core: scheduler, result slots, frames and COPY rows.

What each name promises stands in `_core.pyi`. Here is how: steps wait in binary heaps whose keys
are plain C numbers, messages and rows are written with memcpy, and nothing on the way of a step
calls back into Python. Sockets, loops, clocks and SQL are left to the modules above.
"""

cimport cython
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.dict cimport PyDict_DelItem, PyDict_GetItemWithError, PyDict_SetItem
from cpython.list cimport PyList_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_SIZE
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from xxhash import xxh3_128_digest as _xxh3_128_digest


cdef extern from *:
    """
    #include <stdint.h>

    #ifndef KAGZI_SOURCE_HASH
    #define KAGZI_SOURCE_HASH unknown
    #endif
    #define KAGZI_STRING_OF(name) #name
    #define KAGZI_STRING(name) KAGZI_STRING_OF(name)
    #define KAGZI_SOURCE_HASH_STRING KAGZI_STRING(KAGZI_SOURCE_HASH)

    /* Byte by byte, so that they hold on any machine; compilers make one move of each. */
    static inline void kagzi_put_be16(char *to, uint16_t value) {
        to[0] = (char)(value >> 8); to[1] = (char)value;
    }
    static inline void kagzi_put_be32(char *to, uint32_t value) {
        to[0] = (char)(value >> 24); to[1] = (char)(value >> 16);
        to[2] = (char)(value >> 8); to[3] = (char)value;
    }
    static inline void kagzi_put_be64(char *to, uint64_t value) {
        kagzi_put_be32(to, (uint32_t)(value >> 32)); kagzi_put_be32(to + 4, (uint32_t)value);
    }
    static inline void kagzi_put_le32(char *to, uint32_t value) {
        to[0] = (char)value; to[1] = (char)(value >> 8);
        to[2] = (char)(value >> 16); to[3] = (char)(value >> 24);
    }
    static inline void kagzi_put_le64(char *to, uint64_t value) {
        kagzi_put_le32(to, (uint32_t)value); kagzi_put_le32(to + 4, (uint32_t)(value >> 32));
    }
    static inline uint32_t kagzi_get_le32(const char *from) {
        const unsigned char *bytes = (const unsigned char *)from;
        return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8
            | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
    }
    static inline uint64_t kagzi_get_le64(const char *from) {
        return (uint64_t)kagzi_get_le32(from) | (uint64_t)kagzi_get_le32(from + 4) << 32;
    }
    """
    const char* KAGZI_SOURCE_HASH_STRING
    void put_be16 "kagzi_put_be16"(char* to, int value) nogil
    void put_be32 "kagzi_put_be32"(char* to, uint32_t value) nogil
    void put_be64 "kagzi_put_be64"(char* to, uint64_t value) nogil
    void put_le32 "kagzi_put_le32"(char* to, uint32_t value) nogil
    void put_le64 "kagzi_put_le64"(char* to, uint64_t value) nogil
    uint32_t get_le32 "kagzi_get_le32"(const char* data) nogil
    uint64_t get_le64 "kagzi_get_le64"(const char* data) nogil

cdef extern from "Python.h":
    ctypedef struct PyListObject:
        PyObject** ob_item
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    object PySequence_Fast(object sequence, const char* message)
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)
    PyObject* PySequence_Fast_GET_ITEM(object sequence, Py_ssize_t index)


SOURCE_HASH = KAGZI_SOURCE_HASH_STRING.decode("ascii")

cdef enum:
    ASYNC = 0
    THREAD = 1
    CPU = 2
    OWN_ASYNC = 3
    OWN_THREAD = 4
    OWN_CPU = 5
    ALONE = 6
    LANE_COUNT = 7

LANE_ASYNC = ASYNC
LANE_THREAD = THREAD
LANE_CPU = CPU
LANE_OWN_ASYNC = OWN_ASYNC
LANE_OWN_THREAD = OWN_THREAD
LANE_OWN_CPU = OWN_CPU
LANE_ALONE = ALONE
LANES = LANE_COUNT

cdef enum:
    IS_NEW = 0
    IS_WAITING = 1
    IS_BEGUN = 2
    IS_SUSPENDED = 3
    IS_RESUMING = 4
    IS_ENDED = 5

NEW = IS_NEW
WAITING = IS_WAITING
BEGUN = IS_BEGUN
SUSPENDED = IS_SUSPENDED
RESUMING = IS_RESUMING
ENDED = IS_ENDED

cdef enum:
    GROUP_ROLE = 1
    FUNCTION_ROLE = 2


cdef inline int check_lane(int lane) except -1:
    if lane < 0 or lane >= LANE_COUNT:
        raise ValueError(f"lane {lane}: lanes are 0 to {LANE_COUNT - 1}")
    return lane


# --- Heaps ---------------------------------------------------------------------------------------

cdef struct Key:
    int64_t priority
    int64_t arrival


cdef inline bint is_before(Key left, Key right) noexcept:
    if left.priority != right.priority:
        return left.priority > right.priority
    return left.arrival < right.arrival


@cython.final
cdef class _Heap:
    """Steps by (priority descending, arrival), four children to a node: one cache line of keys.

    The steps are in a list, so that the garbage collector sees them; their keys beside it, in an
    array. Each step knows where it is, so that it can be taken out from the middle. Nothing here
    frees a step or calls back into Python.
    """

    cdef Key* keys
    cdef Py_ssize_t capacity
    cdef list items
    cdef Gate gate  # the function gate of all its steps; only in the heaps of a place

    def __cinit__(self):
        self.items = []

    def __dealloc__(self):
        PyMem_Free(self.keys)

    cdef inline Py_ssize_t size(self) noexcept:
        return PyList_GET_SIZE(self.items)

    cdef inline PyObject** slots(self) noexcept:
        return (<PyListObject*>self.items).ob_item

    cdef int set_capacity(self, Py_ssize_t capacity) except -1:
        cdef Key* keys = <Key*>PyMem_Realloc(self.keys, capacity * sizeof(Key))
        if keys == NULL:
            raise MemoryError
        self.keys = keys
        self.capacity = capacity
        return 0

    cdef int push(self, Step step, int64_t priority, int64_t arrival) except -1:
        cdef Py_ssize_t index = self.size()
        cdef Key key
        if index == self.capacity:
            self.set_capacity(index * 2 if index else 8)
        self.items.append(step)
        step.home = self
        key.priority = priority
        key.arrival = arrival
        self.rise(index, key, self.slots()[index])
        return 0

    cdef inline void put(self, Py_ssize_t index, Key key, PyObject* item) noexcept:
        self.keys[index] = key
        self.slots()[index] = item
        (<Step>item).home_index = index

    cdef void rise(self, Py_ssize_t index, Key key, PyObject* item) noexcept:
        cdef Py_ssize_t parent
        while index > 0:
            parent = (index - 1) >> 2
            if not is_before(key, self.keys[parent]):
                break
            self.put(index, self.keys[parent], self.slots()[parent])
            index = parent
        self.put(index, key, item)

    cdef void sink(self, Py_ssize_t index, Key key, PyObject* item) noexcept:
        cdef Py_ssize_t size = self.size()
        cdef Py_ssize_t child, end, best
        while True:
            child = (index << 2) + 1
            if child >= size:
                break
            end = min(child + 4, size)
            best = child
            child += 1
            while child < end:
                if is_before(self.keys[child], self.keys[best]):
                    best = child
                child += 1
            if not is_before(self.keys[best], key):
                break
            self.put(index, self.keys[best], self.slots()[best])
            index = best
        self.put(index, key, item)

    cdef int remove(self, Step step) except -1:
        """Take out a step that is in this heap."""
        cdef Py_ssize_t index = step.home_index
        cdef Py_ssize_t last = self.size() - 1
        cdef PyObject** slots = self.slots()
        cdef PyObject* item = slots[last]
        cdef Key key = self.keys[last]
        slots[last] = slots[index]
        slots[index] = item
        self.items.pop()
        step.home = None
        if index < last:
            if index > 0 and is_before(key, self.keys[(index - 1) >> 2]):
                self.rise(index, key, item)
            else:
                self.sink(index, key, item)
        if self.capacity > 64 and last * 4 < self.capacity:
            self.set_capacity(self.capacity // 2)
        return 0

    cdef Step pop(self):
        """The best step, or None."""
        cdef Step step
        if self.size() == 0:
            return None
        step = <Step>self.slots()[0]
        self.remove(step)
        return step


# --- Gates, places, steps ------------------------------------------------------------------------

@cython.final
cdef class Gate:
    cdef readonly int64_t limit
    cdef readonly int64_t held
    cdef int role
    cdef int64_t users  # steps in the scheduler that name this gate
    cdef Scheduler owner  # while there are users
    cdef _Heap waiting  # of a group's gate: steps without a permit
    # Of a function's gate: steps set aside per lane, steps that wait in a lane (aside or not), and
    # steps that resume, for each of which one permit is spoken for.
    cdef list asides
    cdef Py_ssize_t queued[LANE_COUNT]
    cdef int64_t resuming

    def __cinit__(self, int64_t limit):
        if limit < 1:
            raise ValueError(f"a gate's limit is at least 1, not {limit}")
        self.limit = limit
        memset(self.queued, 0, sizeof(self.queued))

    def __repr__(self):
        return f"<Gate {self.held}/{self.limit}>"

    cdef int prepare(self, Scheduler owner, int role) except -1:
        """Refuse, or make all that `enter` needs; changes nothing that can be seen."""
        if self.users and self.owner is not owner:
            raise ValueError("the gate is in use by another scheduler")
        if self.users and self.role != role:
            raise ValueError("one gate cannot limit a group and a function")
        if role == GROUP_ROLE:
            if self.waiting is None:
                self.waiting = _Heap()
        elif self.asides is None:
            self.asides = [_Heap() for lane in range(LANE_COUNT)]
        return 0

    cdef void enter(self, Scheduler owner, int role) noexcept:
        self.owner = owner
        self.role = role
        self.users += 1

    cdef void leave(self) noexcept:
        self.users -= 1
        if self.users == 0:
            self.owner = None

    cdef inline int64_t spare(self) noexcept:
        """Permits of a function's gate that a new step may take."""
        return self.limit - self.held - self.resuming

    cdef _Heap aside(self, int lane):
        return <_Heap>self.asides[lane]

    cdef int set_aside(self, Step step) except -1:
        return self.aside(step.lane_).push(step, step.priority_, step.number)


@cython.final
cdef class Place:
    cdef public object name
    cdef public bint open
    cdef int64_t held_[LANE_COUNT]
    cdef int64_t room_[LANE_COUNT]
    cdef int64_t users  # begun steps, whatever they do now
    cdef Scheduler owner  # while there are users
    cdef list resuming  # one list of heaps per lane, one heap per function gate, by order of resume

    def __cinit__(self, room, name=None):
        cdef int lane
        rooms = list(room)
        if not 0 < len(rooms) <= LANE_COUNT:
            raise ValueError(f"a place has room for up to {LANE_COUNT} lanes, not {len(rooms)}")
        memset(self.held_, 0, sizeof(self.held_))
        memset(self.room_, 0, sizeof(self.room_))
        for lane in range(len(rooms)):
            self.set_room(lane, rooms[lane])
        self.name = name
        self.open = True
        self.resuming = [[] for lane in range(LANE_COUNT)]

    def __repr__(self):
        return f"<Place {self.name!r}{'' if self.open else ' closed'}>"

    def held(self, int lane):
        return self.held_[check_lane(lane)]

    def room(self, int lane):
        return self.room_[check_lane(lane)]

    def set_room(self, int lane, int64_t room):
        check_lane(lane)
        if room < 0:
            raise ValueError(f"room {room}: a place cannot have less than none")
        self.room_[lane] = room

    cdef inline bint has_room(self, int lane) noexcept:
        return self.held_[lane] < self.room_[lane]

    cdef _Heap resuming_heap(self, int lane, Gate function_gate):
        cdef list heaps = <list>self.resuming[lane]
        cdef _Heap heap
        for heap in heaps:
            if heap.gate is function_gate:
                return heap
        heap = _Heap()
        heap.gate = function_gate
        heaps.append(heap)
        return heap

    cdef Step pop_resuming(self):
        """The step that was resumed first among those that can go on now, or None."""
        cdef list heaps
        cdef _Heap heap, best_heap = None
        cdef int lane
        cdef Py_ssize_t index
        for lane in range(LANE_COUNT):
            heaps = <list>self.resuming[lane]
            if PyList_GET_SIZE(heaps) == 0 or not self.has_room(lane):
                continue
            index = 0
            while index < PyList_GET_SIZE(heaps):
                heap = <_Heap>heaps[index]
                if heap.size() == 0:
                    del heaps[index]
                    continue
                index += 1
                if heap.gate is not None and heap.gate.held >= heap.gate.limit:
                    continue
                if best_heap is None or is_before(heap.keys[0], best_heap.keys[0]):
                    best_heap = heap
        return None if best_heap is None else best_heap.pop()


@cython.final
@cython.freelist(512)
cdef class Step:
    cdef public object run
    cdef public bytes run_id
    cdef public str id
    cdef public object definition
    cdef public str function
    cdef public bytes input
    cdef public bytes input_hash
    cdef public object group
    cdef public int64_t index
    cdef public bytes group_id
    cdef public str parent_id
    cdef public int32_t call_number

    cdef int lane_
    cdef int64_t priority_
    cdef Gate gate_
    cdef Gate function_gate_
    cdef readonly Place place
    cdef readonly int64_t number
    cdef readonly int state

    cdef public int32_t attempt
    cdef public int64_t timeout_us
    cdef public str status
    cdef public bytes output
    cdef public bytes error
    cdef public int64_t started_us
    cdef public int64_t completed_us
    cdef public int32_t completed_number
    cdef public int32_t process_id
    cdef public bytes worker_id
    cdef public object extra

    cdef Scheduler owner  # while in a scheduler
    cdef _Heap home  # the heap it waits in
    cdef Py_ssize_t home_index
    cdef bint was_resumed

    def __cinit__(
        self,
        object run,
        bytes run_id not None,
        str id not None,
        object definition,
        str function not None,
        bytes input not None,
        bytes input_hash not None,
        int lane=0,
        int64_t priority=0,
        Gate gate=None,
        Gate function_gate=None,
        object group=None,
        int64_t index=-1,
    ):
        self.run = run
        self.run_id = run_id
        self.id = id
        self.definition = definition
        self.function = function
        self.input = input
        self.input_hash = input_hash
        self.lane_ = check_lane(lane)
        self.priority_ = priority
        self.gate_ = gate
        self.function_gate_ = function_gate
        self.group = group
        self.index = index
        self.status = ""
        # Memory from the freelist is zeroed too, so the numbers that start at 0 are set.
        self.attempt = 1

    def __repr__(self):
        return f"<Step {self.id!r} {_STATE_NAMES[self.state]}>"

    cdef int check_out(self) except -1:
        if self.owner is not None:
            raise ValueError(f"step {self.id!r} is in a scheduler: its place in line is fixed")
        return 0

    @property
    def lane(self):
        return self.lane_

    @lane.setter
    def lane(self, int lane):
        self.check_out()
        self.lane_ = check_lane(lane)

    @property
    def priority(self):
        return self.priority_

    @priority.setter
    def priority(self, int64_t priority):
        self.check_out()
        self.priority_ = priority

    @property
    def gate(self):
        return self.gate_

    @gate.setter
    def gate(self, Gate gate):
        self.check_out()
        self.gate_ = gate

    @property
    def function_gate(self):
        return self.function_gate_

    @function_gate.setter
    def function_gate(self, Gate gate):
        self.check_out()
        self.function_gate_ = gate


_STATE_NAMES = ("new", "waiting", "begun", "suspended", "resuming", "ended")


# --- Scheduler -----------------------------------------------------------------------------------

@cython.final
cdef class Scheduler:
    cdef list heaps  # per lane
    cdef Py_ssize_t ready_[LANE_COUNT]
    cdef dict found  # number -> step: begun, suspended or resuming
    cdef int64_t last_number
    cdef int64_t last_resume
    cdef Py_ssize_t waiting_

    def __cinit__(self):
        self.heaps = [_Heap() for lane in range(LANE_COUNT)]
        memset(self.ready_, 0, sizeof(self.ready_))
        self.found = {}

    cdef inline _Heap lane_heap(self, int lane):
        return <_Heap>self.heaps[lane]

    # Steps in and out of line

    cdef int enter_step(self, Step step) except -1:
        cdef Gate gate = step.gate_, function_gate = step.function_gate_
        cdef Place last_place = step.place  # freed, if it is, when all is in order again
        if gate is not None:
            if gate is function_gate:
                raise ValueError("one gate cannot limit a group and a function")
            gate.prepare(self, GROUP_ROLE)
        if function_gate is not None:
            function_gate.prepare(self, FUNCTION_ROLE)
        if step.owner is not None:
            raise ValueError(f"step {step.id!r} is in a scheduler already")
        if function_gate is not None:
            function_gate.enter(self, FUNCTION_ROLE)
        self.last_number += 1
        step.number = self.last_number
        step.owner = self
        step.place = None
        step.state = IS_WAITING
        step.was_resumed = False
        self.waiting_ += 1
        if gate is None:
            return self.enter_lane(step)
        gate.enter(self, GROUP_ROLE)
        if gate.held < gate.limit:
            gate.held += 1
            return self.enter_lane(step)
        return gate.waiting.push(step, step.priority_, step.number)

    cdef int enter_lane(self, Step step) except -1:
        """For a WAITING step that has its gate's permit."""
        cdef Gate function_gate = step.function_gate_
        if function_gate is not None:
            function_gate.queued[step.lane_] += 1
            if function_gate.spare() <= 0:
                return function_gate.set_aside(step)
        self.ready_[step.lane_] += 1
        return self.lane_heap(step.lane_).push(step, step.priority_, step.number)

    cdef inline void leave_lane(self, Step step) noexcept:
        cdef Gate function_gate = step.function_gate_
        self.waiting_ -= 1
        if function_gate is not None:
            function_gate.queued[step.lane_] -= 1
            if function_gate.spare() <= 0:
                return
        self.ready_[step.lane_] -= 1

    cdef int leave_gate(self, Gate gate) except -1:
        """Give back a permit of a group's gate: the best of its waiting steps moves up."""
        cdef Step step
        gate.held -= 1
        gate.leave()
        if gate.held < gate.limit:
            step = gate.waiting.pop()
            if step is not None:
                gate.held += 1
                return self.enter_lane(step)
        return 0

    # For each function gate and lane, the lane's heap holds at least its best `spare()` steps, or
    # all of them: whatever raises `spare` or takes a step of the gate out of the lane without a
    # permit brings one back from aside. So `take` never has to look aside.

    cdef int use_function(self, Gate gate, int held, int resuming) except -1:
        """Count `held` more permits and `resuming` more steps that one is kept for."""
        cdef int64_t before = gate.spare()
        cdef int64_t after
        cdef int lane
        gate.held += held
        gate.resuming += resuming
        after = gate.spare()
        if (before > 0) != (after > 0):
            for lane in range(LANE_COUNT):
                self.ready_[lane] += gate.queued[lane] if after > 0 else -gate.queued[lane]
        if after > before:
            for lane in range(LANE_COUNT):
                self.bring_back(gate, lane)
        return 0

    cdef int bring_back(self, Gate gate, int lane) except -1:
        cdef Step step
        if gate.spare() > 0:
            step = gate.aside(lane).pop()
            if step is not None:
                self.lane_heap(lane).push(step, step.priority_, step.number)
        return 0

    # The moves of a step that began

    cdef int begin(self, Step step, Place place) except -1:
        cdef Gate function_gate = step.function_gate_
        self.leave_lane(step)
        if function_gate is not None:
            self.use_function(function_gate, 1, 0)
        place.held_[step.lane_] += 1
        place.users += 1
        place.owner = self
        step.place = place
        step.state = IS_BEGUN
        step.was_resumed = False
        PyDict_SetItem(self.found, step.number, step)
        return 0

    cdef int go_on(self, Step step) except -1:
        if step.function_gate_ is not None:
            self.use_function(step.function_gate_, 1, -1)
        step.place.held_[step.lane_] += 1
        step.state = IS_BEGUN
        step.was_resumed = True
        return 0

    cdef int end(self, Step step) except -1:
        cdef Gate gate = step.gate_, function_gate = step.function_gate_
        cdef Place place = step.place
        cdef int state = step.state
        step.state = IS_ENDED
        PyDict_DelItem(self.found, step.number)
        if state == IS_BEGUN:
            place.held_[step.lane_] -= 1
        elif state == IS_RESUMING:
            step.home.remove(step)
        place.users -= 1
        if place.users == 0:
            place.owner = None
        if function_gate is not None:
            function_gate.leave()
            if state == IS_BEGUN:
                self.use_function(function_gate, -1, 0)
            elif state == IS_RESUMING:
                self.use_function(function_gate, 0, -1)
        step.owner = None
        if gate is not None:
            self.leave_gate(gate)
        return 0

    cdef inline bint owns(self, Step step) except -1:
        if step.owner is self:
            return True
        if step.owner is not None:
            raise ValueError(f"step {step.id!r} is in another scheduler")
        return False

    def add(self, Step step not None):
        self.enter_step(step)

    def add_all(self, steps):
        for step in steps:
            if type(step) is not Step:
                raise TypeError(f"expected a Step, not {type(step).__name__}")
            self.enter_step(<Step>step)

    def take(self, Place place not None, int64_t most):
        cdef list taken = []
        cdef Step step
        cdef _Heap heap
        cdef int lane
        if place.users and place.owner is not self:
            raise ValueError("the place is in use by another scheduler")
        if place.users:
            while True:
                step = place.pop_resuming()
                if step is None:
                    break
                self.go_on(step)
                taken.append(step)
        if not place.open:
            return taken
        for lane in range(LANE_COUNT - 1, -1, -1):
            heap = self.lane_heap(lane)
            while most > 0 and place.has_room(lane):
                step = heap.pop()
                if step is None:
                    break
                if step.function_gate_ is not None and step.function_gate_.spare() <= 0:
                    step.function_gate_.set_aside(step)
                    continue
                self.begin(step, place)
                taken.append(step)
                most -= 1
        return taken

    def resumed(self, Step step not None):
        return step.was_resumed

    def finish(self, Step step not None):
        if self.owns(step) and step.state != IS_WAITING:
            self.end(step)

    def suspend(self, Step step not None):
        if not self.owns(step) or step.state != IS_BEGUN:
            return
        step.state = IS_SUSPENDED
        step.place.held_[step.lane_] -= 1
        if step.function_gate_ is not None:
            self.use_function(step.function_gate_, -1, 0)

    def resume(self, Step step not None):
        cdef _Heap heap
        if not self.owns(step) or step.state != IS_SUSPENDED:
            return
        heap = step.place.resuming_heap(step.lane_, step.function_gate_)
        if step.state != IS_SUSPENDED:  # making a heap can set off the collector, and finalizers
            return
        self.last_resume += 1
        heap.push(step, 0, self.last_resume)
        step.state = IS_RESUMING
        if step.function_gate_ is not None:
            self.use_function(step.function_gate_, 0, 1)

    def drop(self, Step step not None):
        cdef Gate gate = step.gate_, function_gate = step.function_gate_
        cdef _Heap home = step.home
        if not self.owns(step) or step.state != IS_WAITING or home is None:
            return False
        home.remove(step)
        step.state = IS_ENDED
        if function_gate is not None:
            function_gate.leave()
        step.owner = None
        if gate is not None and home is gate.waiting:
            self.waiting_ -= 1
            gate.leave()
            return True
        self.leave_lane(step)
        if function_gate is not None and home is self.lane_heap(step.lane_):
            self.bring_back(function_gate, step.lane_)
        if gate is not None:
            self.leave_gate(gate)
        return True

    def ready(self, int lane):
        return self.ready_[check_lane(lane)]

    def find(self, number):
        return self.found.get(number)

    @property
    def begun(self):
        return len(self.found)

    def waiting(self):
        return self.waiting_

    def absorb(self, list messages not None, int done, int32_t process_id):
        cdef list steps = [], others = []
        cdef tuple message
        cdef PyObject* known
        cdef Step step
        cdef int kind
        cdef int64_t first, second
        for item in messages:
            if not PyTuple_CheckExact(item) or PyTuple_GET_SIZE(item) != 6:
                raise TypeError("a message is a tuple of six")
            message = <tuple>item
            kind = message[0]
            if kind != done:
                others.append(message)
                continue
            known = PyDict_GetItemWithError(self.found, message[1])
            if known == NULL:
                continue
            step = <Step>known
            first = message[2]
            second = message[3]
            if not PyBytes_CheckExact(message[5]):
                raise TypeError("the body of a message is bytes")
            step.output = <bytes>message[5]
            step.status = "completed"
            step.started_us = first
            step.completed_us = <int64_t>(<uint64_t>first + <uint64_t>second)
            step.process_id = process_id
            self.end(step)
            steps.append(step)
        return steps, others


# --- Slots ---------------------------------------------------------------------------------------

cdef enum:
    OPEN = 0
    FILLED = 1
    FAILED = 2


@cython.final
cdef class Slots:
    cdef char* marks
    cdef Py_ssize_t size
    cdef readonly Py_ssize_t succeeded
    cdef readonly Py_ssize_t failed
    cdef readonly int64_t busy_us
    cdef readonly int64_t longest_us
    cdef readonly list values
    cdef dict failures_
    cdef int64_t last_failure
    cdef bint in_order

    def __cinit__(self, Py_ssize_t size):
        if size < 0:
            raise ValueError(f"{size} slots: a group cannot have less than none")
        self.values = [None] * size
        self.marks = <char*>PyMem_Malloc(size + 1)
        if self.marks == NULL:
            raise MemoryError
        memset(self.marks, OPEN, size + 1)
        self.size = size
        self.failures_ = {}
        self.last_failure = -1
        self.in_order = True

    def __dealloc__(self):
        PyMem_Free(self.marks)

    def __len__(self):
        return self.size

    cdef inline int check(self, int64_t index) except -1:
        if index < 0 or index >= self.size:
            raise ValueError(f"slot {index} of {self.size}")
        return 0

    cdef inline bint settle(self, int64_t index, object value) except -1:
        self.check(index)
        if self.marks[index] != OPEN:
            return False
        if PyList_GET_SIZE(self.values) != self.size:
            raise ValueError("the list of values has changed its length")
        self.marks[index] = FILLED
        self.succeeded += 1
        self.values[index] = value
        return True

    cdef inline void count_time(self, int64_t started_us, int64_t completed_us) noexcept:
        cdef int64_t time_us = 0
        if 0 < started_us < completed_us:
            time_us = completed_us - started_us
        self.busy_us = <int64_t>(<uint64_t>self.busy_us + <uint64_t>time_us)
        if time_us > self.longest_us:
            self.longest_us = time_us

    def fill(self, int64_t index, value):
        return self.settle(index, value)

    def fail(self, int64_t index, failure):
        self.check(index)
        if self.marks[index] != OPEN:
            return False
        self.failures_[index] = failure
        self.marks[index] = FAILED
        self.failed += 1
        if index < self.last_failure:
            self.in_order = False
        self.last_failure = index
        return True

    def fill_steps(self, list steps not None):
        cdef Py_ssize_t count = 0
        cdef Step step
        for item in steps:
            if type(item) is not Step:
                raise TypeError(f"expected a Step, not {type(item).__name__}")
            step = <Step>item
            if self.settle(step.index, step.output):
                self.count_time(step.started_us, step.completed_us)
                count += 1
        return count

    def add_time(self, int64_t started_us, int64_t completed_us):
        self.count_time(started_us, completed_us)

    def settled(self, int64_t index):
        self.check(index)
        return self.marks[index] != OPEN

    @property
    def remaining(self):
        return self.size - self.succeeded - self.failed

    @property
    def failures(self):
        if not self.in_order:
            self.failures_ = dict(sorted(self.failures_.items(), key=lambda item: item[0]))
            self.in_order = True
            self.last_failure = self.size
        return self.failures_


# --- What is stored ------------------------------------------------------------------------------

@cython.final
cdef class StoredStep:
    # Bytes and text only, so the garbage collector has no use for the many that a run can have.
    cdef readonly str status
    cdef readonly str function
    cdef readonly bytes input_hash
    cdef readonly bytes output
    cdef readonly bytes error
    cdef readonly int32_t attempts
    cdef readonly int32_t call_number
    cdef readonly int32_t completed_number
    cdef int32_t visible_  # -1: None
    cdef readonly bint in_group
    cdef readonly int64_t output_bytes

    def __init__(
        self,
        str status not None,
        str function not None,
        bytes input_hash not None,
        bytes output,
        bytes error,
        int32_t attempts,
        int32_t call_number,
        int32_t completed_number,
        visible_number=None,
        bint in_group=False,
        output_bytes=None,
    ):
        self.status = status
        self.function = function
        self.input_hash = input_hash
        self.output = output
        self.error = error
        self.attempts = attempts
        self.call_number = call_number
        self.completed_number = completed_number
        self.visible_ = -1 if visible_number is None else visible_number
        self.in_group = in_group
        if output_bytes is not None:
            self.output_bytes = output_bytes
        elif output is not None:
            self.output_bytes = PyBytes_GET_SIZE(output)

    def __repr__(self):
        return f"<StoredStep {self.function} {self.status}>"

    @property
    def visible_number(self):
        return None if self.visible_ < 0 else self.visible_

    @property
    def is_elsewhere(self):
        return self.output is None and self.output_bytes > 0

    def seen(self, int32_t number):
        return StoredStep(
            self.status, self.function, self.input_hash, self.output, self.error, self.attempts,
            self.call_number, self.completed_number, number, self.in_group, self.output_bytes,
        )


def take_stored(list rows not None, list runs not None, list numbers not None):
    cdef Py_ssize_t elsewhere = 0
    cdef int64_t place, number
    cdef str function = "", status = ""
    cdef StoredStep stored
    cdef tuple row
    for item in rows:
        if not PyTuple_CheckExact(item) or PyTuple_GET_SIZE(item) != 13:
            raise TypeError("a row is a tuple of thirteen")
        row = <tuple>item
        place = row[0]
        if not 0 <= place < PyList_GET_SIZE(runs) or PyList_GET_SIZE(numbers) <= place:
            raise ValueError(f"run {place} of {len(runs)}")
        # Most rows repeat these: one text serves them all.
        if row[2] != status:
            status = row[2]
        if row[3] != function:
            function = row[3]
        stored = StoredStep(
            status, function, row[4], row[5], row[6], row[7], row[8], row[9], row[10], row[11],
            row[12],
        )
        (<dict?>runs[place])[row[1]] = stored
        number = max(stored.call_number, stored.completed_number, stored.visible_)
        if number > numbers[place]:
            numbers[place] = number
        if stored.output is None and stored.output_bytes > 0:
            elsewhere += 1
    return elsewhere


# --- Frames --------------------------------------------------------------------------------------

cdef enum:
    PREFIX_BYTES = 4
    FIXED_BYTES = 29  # kind, number, first, second and the length of the head
    KEPT_BYTES = 1 << 20  # a buffer that grew larger is given back when it is empty

cdef int64_t MOST_BYTES = 0x7FFF_FFFF


cdef struct Buffer:
    char* data
    Py_ssize_t size
    Py_ssize_t capacity


cdef char* extend(Buffer* buffer, Py_ssize_t count) except NULL:
    """`count` more bytes at the end of the buffer, to be written by the caller."""
    cdef Py_ssize_t size = buffer.size + count
    cdef Py_ssize_t capacity
    cdef char* data
    if size > buffer.capacity:
        capacity = max(size, buffer.capacity * 2, 4096)
        data = <char*>PyMem_Realloc(buffer.data, capacity)
        if data == NULL:
            raise MemoryError
        buffer.data = data
        buffer.capacity = capacity
    data = buffer.data + buffer.size
    buffer.size = size
    return data


cdef void empty(Buffer* buffer) noexcept:
    buffer.size = 0
    if buffer.capacity > KEPT_BYTES:
        PyMem_Free(buffer.data)
        buffer.data = NULL
        buffer.capacity = 0


@cython.final
cdef class FrameWriter:
    cdef Buffer buffer

    def __cinit__(self):
        memset(&self.buffer, 0, sizeof(Buffer))

    def __dealloc__(self):
        PyMem_Free(self.buffer.data)

    def __len__(self):
        return self.buffer.size

    cdef inline char* begin(
        self, int kind, uint64_t number, int64_t first, int64_t second, Py_ssize_t head,
        Py_ssize_t body, bint with_body=True,
    ) except NULL:
        """Room for head and body, after the fields before them."""
        cdef char* to
        if kind < 0 or kind > 255:
            raise ValueError(f"kind {kind}: kinds are 0 to 255")
        if head > MOST_BYTES - FIXED_BYTES or body > MOST_BYTES - FIXED_BYTES - head:
            raise ValueError(f"a message holds at most {MOST_BYTES} bytes")
        to = extend(&self.buffer, PREFIX_BYTES + FIXED_BYTES + head + (body if with_body else 0))
        put_le32(to, <uint32_t>(FIXED_BYTES + head + body))
        to[4] = <char>kind
        put_le64(to + 5, number)
        put_le64(to + 13, <uint64_t>first)
        put_le64(to + 21, <uint64_t>second)
        put_le32(to + 29, <uint32_t>head)
        return to + PREFIX_BYTES + FIXED_BYTES

    def add(
        self,
        int kind,
        uint64_t number,
        int64_t first=0,
        int64_t second=0,
        bytes head not None=b"",
        bytes body not None=b"",
    ):
        cdef Py_ssize_t head_size = PyBytes_GET_SIZE(head)
        cdef Py_ssize_t body_size = PyBytes_GET_SIZE(body)
        cdef char* to = self.begin(kind, number, first, second, head_size, body_size)
        memcpy(to, PyBytes_AS_STRING(head), head_size)
        memcpy(to + head_size, PyBytes_AS_STRING(body), body_size)

    def add_head(
        self, int kind, uint64_t number, int64_t first, int64_t second, bytes head not None,
        Py_ssize_t body_size,
    ):
        cdef Py_ssize_t head_size = PyBytes_GET_SIZE(head)
        cdef char* to
        if body_size < 0:
            raise ValueError(f"a body of {body_size} bytes cannot follow")
        to = self.begin(kind, number, first, second, head_size, body_size, False)
        memcpy(to, PyBytes_AS_STRING(head), head_size)

    def add_step(self, int kind, Step step not None, int64_t function_number):
        cdef Py_ssize_t id_size, body_size
        cdef const char* id_bytes
        cdef char* to
        if step.run_id is None or PyBytes_GET_SIZE(step.run_id) != 16:
            raise ValueError("a run id has 16 bytes")
        if step.id is None or step.input is None:
            raise ValueError("a step has an id and an input")
        if step.attempt < 0 or step.attempt > 0xFFFF:
            raise ValueError(f"attempt {step.attempt}: a frame carries 0 to 65535")
        if step.timeout_us < 0 or step.timeout_us >= <int64_t>1 << 47:
            raise ValueError(f"timeout of {step.timeout_us} us: a frame carries 0 to 2**47 - 1")
        id_bytes = PyUnicode_AsUTF8AndSize(step.id, &id_size)
        body_size = PyBytes_GET_SIZE(step.input)
        to = self.begin(
            kind, <uint64_t>step.number, function_number,
            <int64_t>step.attempt | step.timeout_us << 16, 16 + id_size, body_size,
        )
        memcpy(to, PyBytes_AS_STRING(step.run_id), 16)
        memcpy(to + 16, id_bytes, id_size)
        memcpy(to + 16 + id_size, PyBytes_AS_STRING(step.input), body_size)

    def take(self):
        cdef bytes data = PyBytes_FromStringAndSize(self.buffer.data, self.buffer.size)
        empty(&self.buffer)
        return data


@cython.final
cdef class FrameReader:
    cdef Buffer buffer  # the beginning of a message whose end has not come
    cdef int64_t most_bytes
    cdef bint is_broken

    def __cinit__(self, int64_t most_bytes=MOST_BYTES):
        if most_bytes < FIXED_BYTES or most_bytes > 0xFFFF_FFFF:
            raise ValueError(f"a message has {FIXED_BYTES} to {0xFFFF_FFFF} bytes")
        memset(&self.buffer, 0, sizeof(Buffer))
        self.most_bytes = most_bytes

    def __dealloc__(self):
        PyMem_Free(self.buffer.data)

    @property
    def pending_bytes(self):
        return self.buffer.size

    cdef int64_t length_at(self, const char* data) except -1:
        cdef int64_t length = get_le32(data)
        if length < FIXED_BYTES or length > self.most_bytes:
            self.is_broken = True
            raise ValueError(f"a message of {length} bytes: not from a frame writer")
        return length

    cdef tuple message_at(self, const char* data, int64_t length):
        cdef int64_t head = get_le32(data + 25)
        if head > length - FIXED_BYTES:
            self.is_broken = True
            raise ValueError(f"a head of {head} bytes in a message of {length}")
        return (
            <int><unsigned char>data[0],
            get_le64(data + 1),
            <int64_t>get_le64(data + 9),
            <int64_t>get_le64(data + 17),
            PyBytes_FromStringAndSize(data + FIXED_BYTES, head),
            PyBytes_FromStringAndSize(data + FIXED_BYTES + head, length - FIXED_BYTES - head),
        )

    cdef Py_ssize_t keep(self, const char* data, Py_ssize_t size, Py_ssize_t wanted) except -1:
        """Copy from `data` until `wanted` bytes are pending; how many were copied."""
        cdef Py_ssize_t count = min(size, wanted - self.buffer.size)
        memcpy(extend(&self.buffer, count), data, count)
        return count

    def feed(self, bytes data not None):
        cdef list messages = []
        cdef const char* at = PyBytes_AS_STRING(data)
        cdef const char* end = at + PyBytes_GET_SIZE(data)
        cdef int64_t length
        if self.is_broken:
            raise ValueError("the reader was given bytes that are not from a frame writer")
        if self.buffer.size > 0:
            if self.buffer.size < PREFIX_BYTES:
                at += self.keep(at, end - at, PREFIX_BYTES)
                if self.buffer.size < PREFIX_BYTES:
                    return messages
            length = self.length_at(self.buffer.data)
            at += self.keep(at, end - at, PREFIX_BYTES + length)
            if self.buffer.size < PREFIX_BYTES + length:
                return messages
            messages.append(self.message_at(self.buffer.data + PREFIX_BYTES, length))
            empty(&self.buffer)
        while end - at >= PREFIX_BYTES:
            length = self.length_at(at)
            if end - at - PREFIX_BYTES < length:
                break
            messages.append(self.message_at(at + PREFIX_BYTES, length))
            at += PREFIX_BYTES + length
        if at < end:
            memcpy(extend(&self.buffer, end - at), at, end - at)
        return messages


# --- Rows ----------------------------------------------------------------------------------------

cdef enum:
    COLUMNS = 17
    STORED_BYTES = 8192
    HEADER_BYTES = 19
    ARRAY_HEADER_BYTES = 20
    EMPTY_ARRAY_BYTES = 12

INPUT_STORED_BYTES = STORED_BYTES

# Postgres counts from 2000-01-01 and begins with Julian day 0.
cdef int64_t EPOCH_US = 946_684_800_000_000
cdef int64_t EARLIEST_US = -210_866_803_200_000_000

cdef enum:
    UUID = 2950
    TEXT = 25
    BYTEA = 17
    INT4 = 23
    TIMESTAMPTZ = 1184

_ARRAY_OIDS = {UUID: 2951, TEXT: 1009, BYTEA: 1001, INT4: 1007, TIMESTAMPTZ: 1185}
_COLUMNS = (
    ("run_id", UUID),
    ("step_id", TEXT),
    ("function", TEXT),
    ("status", TEXT),
    ("output", BYTEA),
    ("error", BYTEA),
    ("input", BYTEA),
    ("input_hash", BYTEA),
    ("attempts", INT4),
    ("parallel_group_id", UUID),
    ("parent_step_id", TEXT),
    ("started_at", TIMESTAMPTZ),
    ("completed_at", TIMESTAMPTZ),
    ("call_number", INT4),
    ("completed_number", INT4),
    ("worker_id", UUID),
    ("process_id", INT4),
)
STEP_COLUMNS = tuple(name for name, _ in _COLUMNS)
STEP_FIELD_OIDS = tuple(oid for _, oid in _COLUMNS)
STEP_COLUMN_OIDS = tuple(_ARRAY_OIDS[oid] for _, oid in _COLUMNS)

cdef uint32_t element_oids[COLUMNS]
for _index in range(COLUMNS):
    element_oids[_index] = _COLUMNS[_index][1]


cdef inline Py_ssize_t measure_text(Step step, str text, str column) except -1:
    cdef Py_ssize_t size
    cdef const char* data
    if text is None:
        raise ValueError(f"step {step.id!r} has no {column}")
    data = PyUnicode_AsUTF8AndSize(text, &size)
    if size > INT32_MAX or memchr(data, 0, size) != NULL:
        raise ValueError(f"step {step.id!r}: its {column} has a NUL or is too long")
    return size


cdef inline Py_ssize_t measure_bytes(Step step, bytes data, str column) except -2:
    """-1 for NULL."""
    if data is None:
        return -1
    if PyBytes_GET_SIZE(data) > INT32_MAX:
        raise ValueError(f"step {step.id!r}: its {column} is too long")
    return PyBytes_GET_SIZE(data)


cdef inline Py_ssize_t measure_uuid(Step step, bytes data, str column) except -1:
    if data is None or PyBytes_GET_SIZE(data) != 16:
        raise ValueError(f"step {step.id!r}: its {column} is not 16 bytes")
    return 16


cdef inline bytes stored_input(Step step):
    if step.input is None or PyBytes_GET_SIZE(step.input) > STORED_BYTES:
        return None
    return step.input


cdef Py_ssize_t measure(Step step, Py_ssize_t* sizes) except -1:
    """Check the step; put the size of each field into `sizes`, -1 for NULL; give the row's size."""
    cdef Py_ssize_t row = 2
    cdef int column
    sizes[0] = measure_uuid(step, step.run_id, "run id")
    sizes[1] = measure_text(step, step.id, "id")
    sizes[2] = measure_text(step, step.function, "function")
    if step.status != "completed" and step.status != "failed":
        raise ValueError(f"step {step.id!r} has the status {step.status!r}: it has not ended")
    sizes[3] = measure_text(step, step.status, "status")
    sizes[4] = measure_bytes(step, step.output, "output")
    sizes[5] = measure_bytes(step, step.error, "error")
    sizes[6] = measure_bytes(step, stored_input(step), "input")
    sizes[7] = measure_bytes(step, step.input_hash, "input hash")
    if sizes[7] < 0:
        raise ValueError(f"step {step.id!r} has no input hash")
    sizes[8] = 4
    sizes[9] = -1 if step.group_id is None else measure_uuid(step, step.group_id, "group id")
    sizes[10] = -1 if step.parent_id is None else measure_text(step, step.parent_id, "parent id")
    sizes[11] = 8
    sizes[12] = 8
    sizes[13] = 4
    sizes[14] = 4
    sizes[15] = measure_uuid(step, step.worker_id, "worker id")
    sizes[16] = 4
    if step.completed_us < EARLIEST_US or step.started_us < EARLIEST_US:
        raise ValueError(f"step {step.id!r}: a time before 4713 BC")
    for column in range(COLUMNS):
        row += 4 + (sizes[column] if sizes[column] > 0 else 0)
    return row


cdef inline char* put_null(char* to) noexcept:
    put_be32(to, 0xFFFF_FFFF)
    return to + 4


cdef inline char* put_data(char* to, const char* data, Py_ssize_t size) noexcept:
    put_be32(to, <uint32_t>size)
    memcpy(to + 4, data, size)
    return to + 4 + size


cdef inline char* put_bytes(char* to, bytes data) noexcept:
    if data is None:
        return put_null(to)
    return put_data(to, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


cdef inline char* put_text(char* to, str text) except NULL:
    cdef Py_ssize_t size
    cdef const char* data
    if text is None:
        return put_null(to)
    data = PyUnicode_AsUTF8AndSize(text, &size)
    return put_data(to, data, size)


cdef inline char* put_int4(char* to, int32_t value) noexcept:
    put_be32(to, 4)
    put_be32(to + 4, <uint32_t>value)
    return to + 8


cdef inline char* put_time(char* to, int64_t unix_us) noexcept:
    put_be32(to, 8)
    put_be64(to + 4, <uint64_t>(unix_us - EPOCH_US))
    return to + 12


cdef int put_fields(Step step, char** to, int stride) except -1:
    """Write field n at `to[n * stride]` and move that on: 0 for a row, 1 for columns.

    An array's element and a row's field look alike: i32 length, or -1 for NULL, then the data.
    """
    cdef int64_t started_us = step.started_us if step.started_us else step.completed_us
    to[0] = put_bytes(to[0], step.run_id)
    to[1 * stride] = put_text(to[1 * stride], step.id)
    to[2 * stride] = put_text(to[2 * stride], step.function)
    to[3 * stride] = put_text(to[3 * stride], step.status)
    to[4 * stride] = put_bytes(to[4 * stride], step.output)
    to[5 * stride] = put_bytes(to[5 * stride], step.error)
    to[6 * stride] = put_bytes(to[6 * stride], stored_input(step))
    to[7 * stride] = put_bytes(to[7 * stride], step.input_hash)
    to[8 * stride] = put_int4(to[8 * stride], step.attempt)
    to[9 * stride] = put_bytes(to[9 * stride], step.group_id)
    to[10 * stride] = put_text(to[10 * stride], step.parent_id)
    to[11 * stride] = put_time(to[11 * stride], started_us)
    to[12 * stride] = put_time(to[12 * stride], step.completed_us)
    to[13 * stride] = put_int4(to[13 * stride], step.call_number)
    to[14 * stride] = put_int4(to[14 * stride], step.completed_number)
    to[15 * stride] = put_bytes(to[15 * stride], step.worker_id)
    to[16 * stride] = put_int4(to[16 * stride], step.process_id)
    return 0


cdef inline Step step_at(object steps, Py_ssize_t index):
    item = <object>PySequence_Fast_GET_ITEM(steps, index)
    if type(item) is not Step:
        raise TypeError(f"expected a Step, not {type(item).__name__}")
    return <Step>item


def row_bytes(Step step not None):
    cdef Py_ssize_t sizes[COLUMNS]
    return measure(step, sizes)


def copy_rows(steps):
    cdef Py_ssize_t sizes[COLUMNS]
    cdef Py_ssize_t index, count, total = HEADER_BYTES + 2
    cdef char* to
    cdef bytes data
    # No code but ours runs between measuring and writing, so no step can change in between.
    steps = PySequence_Fast(steps, "expected a sequence of steps")
    count = PySequence_Fast_GET_SIZE(steps)
    for index in range(count):
        total += measure(step_at(steps, index), sizes)
    data = PyBytes_FromStringAndSize(NULL, total)
    to = PyBytes_AS_STRING(data)
    memcpy(to, b"PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00", HEADER_BYTES)
    to += HEADER_BYTES
    for index in range(count):
        put_be16(to, COLUMNS)
        to += 2
        put_fields(step_at(steps, index), &to, 0)
    put_be16(to, -1)
    return data


def unnest_arrays(steps):
    cdef Py_ssize_t sizes[COLUMNS]
    cdef Py_ssize_t totals[COLUMNS]
    cdef bint has_null[COLUMNS]
    cdef char* to[COLUMNS]
    cdef Py_ssize_t index, count
    cdef int column
    cdef bytes data
    cdef list arrays = []
    steps = PySequence_Fast(steps, "expected a sequence of steps")
    count = PySequence_Fast_GET_SIZE(steps)
    if count > INT32_MAX:
        raise ValueError("too many steps for one array")
    for column in range(COLUMNS):
        totals[column] = ARRAY_HEADER_BYTES if count else EMPTY_ARRAY_BYTES
        has_null[column] = False
    for index in range(count):
        measure(step_at(steps, index), sizes)
        for column in range(COLUMNS):
            totals[column] += 4
            if sizes[column] < 0:
                has_null[column] = True
            else:
                totals[column] += sizes[column]
    for column in range(COLUMNS):
        data = PyBytes_FromStringAndSize(NULL, totals[column])
        arrays.append(data)
        to[column] = PyBytes_AS_STRING(data)
        put_be32(to[column], 1 if count else 0)
        put_be32(to[column] + 4, has_null[column])
        put_be32(to[column] + 8, element_oids[column])
        if count:
            put_be32(to[column] + 12, <uint32_t>count)
            put_be32(to[column] + 16, 1)
        to[column] += ARRAY_HEADER_BYTES
    for index in range(count):
        put_fields(step_at(steps, index), to, 1)
    return arrays


def step_fields(Step step not None):
    cdef Py_ssize_t sizes[COLUMNS]
    cdef bytes row = PyBytes_FromStringAndSize(NULL, measure(step, sizes) - 2)
    cdef char* to = PyBytes_AS_STRING(row)
    cdef const char* field = to
    cdef int column
    cdef list fields = []
    put_fields(step, &to, 0)
    for column in range(COLUMNS):
        field += 4
        if sizes[column] < 0:
            fields.append(None)
        else:
            fields.append(PyBytes_FromStringAndSize(field, sizes[column]))
            field += sizes[column]
    return fields


def hash_input(str function not None, bytes input not None):
    cdef Py_ssize_t function_size, input_size = PyBytes_GET_SIZE(input)
    cdef const char* name = PyUnicode_AsUTF8AndSize(function, &function_size)
    cdef bytes data = PyBytes_FromStringAndSize(NULL, 4 + function_size + input_size)
    cdef char* to = PyBytes_AS_STRING(data)
    put_le32(to, <uint32_t>function_size)
    memcpy(to + 4, name, function_size)
    memcpy(to + 4 + function_size, PyBytes_AS_STRING(input), input_size)
    return _xxh3_128_digest(data)
