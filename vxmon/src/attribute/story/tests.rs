//! Times are simulated: a client that sends SYNs as tcp_retransmit_timer() does, and a conntrack entry that expires.

use proptest::prelude::*;
use vxmon_common::story::NO_VNI;

use super::*;

const SYN: u8 = tcp_flag::SYN;
const ACK: u8 = 0x10;
const MS: u64 = 1_000_000;
/// Some time after boot.
const START: u64 = 77 * SECOND;

fn connection(number: u32, protocol: u8) -> Connection {
    Connection {
        src: [0x0a, number, 0, 0],
        dst: [0x0b, 0, 0, 0],
        sport: 40_000,
        dport: 53,
        scope: 1,
        proto: u32::from(protocol) | 4 << 8,
    }
}

fn tcp() -> Connection {
    connection(0, proto::TCP)
}

fn udp() -> Connection {
    connection(0, proto::UDP)
}

fn packet(connection: Connection, at: u64, tcp_flags: u8) -> Seen {
    Seen { connection, ifindex: 2, at, sport: 4001, tcp_flags, counted: 0, counted_syns: 0, last_bad: 0 }
}

const REWRITTEN: Circumstances =
    Circumstances { entry: Some(Entry { before: 4000, after: 4001, is_assured: false }), is_marked: true };

fn parameters(timeout: u64, linear: u32) -> Parameters {
    Parameters {
        udp_timeout: Some(timeout),
        udp_timeout_stream: Some(4 * timeout),
        txrehash: Some(false),
        syn_linear_timeouts: linear,
        syn_retries: Some(6),
    }
}

/// The gap before retry `number` of a client, by the steps of the kernel's own code.
fn gaps(linear: u32, retries: u32) -> Vec<u64> {
    let (mut rto, mut fired) = (SECOND, 0);
    let mut gaps = Vec::new();
    for _ in 0..retries + linear {
        gaps.push(rto);
        fired += 1;
        if fired > linear {
            rto = (rto * 2).min(120 * SECOND);
        }
    }
    gaps
}

/// What came of a connection whose first SYN was marked.
struct Run {
    so_far: Vec<SoFar>,
    /// When a SYN with a right checksum left.
    good_at: Option<u64>,
    ended: Option<Ended>,
}

/// A client and its node. Timers fire up to an eighth late.
fn run(world: &Parameters, late: u64, rehashes: bool) -> Run {
    let (timeout, mut stories) = (world.udp_timeout.unwrap(), Stories::default());
    let mut so_far = Vec::new();
    let (mut at, mut sport, mut expires) = (START, 4000, 0);
    let gaps = gaps(world.syn_linear_timeouts, world.syn_retries.unwrap());
    for (sent, gap) in std::iter::once(0).chain(gaps).enumerate() {
        at += gap + gap / 8 * late / 100;
        if sent > 0 && rehashes {
            sport += 7;
        }
        let is_bad = sent == 0 || sport == 4000 && at < expires;
        if is_bad {
            expires = at + timeout;
            so_far.push(stories.bad(&packet(tcp(), at, SYN), &REWRITTEN, world));
            continue;
        }
        let good = |at, flags| Seen { sport, ..packet(tcp(), at, flags) };
        assert_eq!(stories.good(&good(at, SYN), world), None);
        let ended = stories.good(&good(at + MS, ACK), world);
        return Run { so_far, good_at: Some(at), ended };
    }
    assert!(stories.expire(at).is_empty());
    let ended = stories.expire(at + 1000 * SECOND);
    Run { so_far, good_at: None, ended: ended.into_iter().next() }
}

#[test]
fn sixty_three_seconds_are_thirty_doubled() {
    let Run { so_far, good_at, ended } = run(&parameters(30 * SECOND, 0), 0, false);
    assert_eq!(so_far.len(), 6);
    let expected = Some((START + 63 * SECOND, By::Timeout));
    assert!(so_far.iter().all(|so_far| so_far.expected == expected), "{so_far:#?}");
    assert_eq!(good_at, Some(START + 63 * SECOND));
    let ended = ended.unwrap();
    assert_eq!((ended.outcome, ended.by, ended.bad, ended.bad_syns), (Outcome::Connected, Some(By::Timeout), 6, 6));
    assert_eq!(ended.at - ended.first_bad, 63 * SECOND + MS);
    assert_eq!(ended.attempts.len(), 8);
}

#[test]
fn linear_timeouts_make_it_sixty_seven() {
    let Run { so_far, good_at, .. } = run(&parameters(30 * SECOND, 4), 0, false);
    assert_eq!(so_far[0].expected, Some((START + 67 * SECOND, By::Timeout)));
    assert_eq!(good_at, Some(START + 67 * SECOND));
    assert_eq!(so_far.last().unwrap().attempt, 10);
}

#[test]
fn another_source_port_recovers_at_the_first_retry() {
    let world = Parameters { txrehash: Some(true), ..parameters(30 * SECOND, 4) };
    let Run { so_far, good_at, ended } = run(&world, 0, true);
    assert_eq!(so_far.len(), 1);
    assert_eq!(so_far[0].expected, Some((START + SECOND, By::SourcePort)));
    assert_eq!(good_at, Some(START + SECOND));
    assert_eq!(ended.unwrap().by, Some(By::SourcePort));
}

/// The sysctl is the watched namespace's, and the client may be in another: the first retry shows which it was.
#[test]
fn a_retry_on_the_same_port_corrects_what_was_expected() {
    let world = Parameters { txrehash: Some(true), ..parameters(30 * SECOND, 0) };
    let Run { so_far, good_at, .. } = run(&world, 0, false);
    assert_eq!(so_far[0].expected, Some((START + SECOND, By::SourcePort)));
    assert_eq!(so_far[1].expected, Some((START + 63 * SECOND, By::Timeout)));
    assert_eq!(good_at, Some(START + 63 * SECOND));
}

#[test]
fn where_retries_end_first_nothing_is_expected() {
    let Run { so_far, good_at, ended } = run(&parameters(300 * SECOND, 4), 0, false);
    assert!(so_far.iter().all(|so_far| so_far.expected.is_none()), "{so_far:#?}");
    assert_eq!((good_at, ended.unwrap().outcome), (None, Outcome::NotSeenAgain));
}

proptest! {
    /// Whatever the parameters: what was expected last comes true, and a client that gives up was not promised anything.
    #[test]
    fn what_is_expected_happens(timeout in 2_u64..130, linear in 0_u32..8, retries in 1_u32..9, late in 0_u64..100, hashes: bool) {
        let timeout = timeout * SECOND + SECOND / 2;
        let world = Parameters { txrehash: Some(hashes), syn_retries: Some(retries), ..parameters(timeout, linear) };
        let Run { so_far, good_at, ended } = run(&world, late, hashes);
        let ended = ended.unwrap();
        let last = so_far.last().unwrap();
        prop_assert_eq!(ended.bad, so_far.len() as u64);
        prop_assert_eq!(ended.outcome == Outcome::Connected, good_at.is_some());
        match (last.expected, good_at) {
            (Some((expected, _)), Some(good_at)) => {
                let gap = good_at - ended.last_bad;
                // A timer may be late enough for a gap that was to be too short.
                let lucky = late > 0 && gap >= timeout && gap - gap / 9 <= timeout;
                let in_time = expected <= good_at && good_at - expected <= gap / 8 + MS;
                prop_assert!(in_time || lucky, "{} {}", expected, good_at);
                // From the first attempt on, if timers are not late.
                prop_assert!(late > 0 || so_far[0].expected == last.expected);
            }
            (None, None) => {}
            // A gap shorter than the timeout that is late enough.
            (None, Some(good_at)) => prop_assert!(good_at - ended.last_bad >= timeout && late > 0),
            (expected, good_at) => prop_assert!(false, "{:?} {:?}", expected, good_at),
        }
    }

    /// Whatever comes in whatever order: each story is counted once, and their number is bounded.
    #[test]
    fn stories_add_up(steps in proptest::collection::vec((0_u8..4, 0_u32..6, any::<u8>(), 0_u64..50, 0_u64..9, any::<u64>()), 0..300)) {
        let (mut stories, mut now, mut ends) = (Stories::default(), START, 0);
        for (what, number, flags, seconds, counted, last_bad) in steps {
            now += seconds * SECOND;
            let seen = Seen {
                counted,
                counted_syns: counted / 2,
                last_bad,
                ..packet(connection(number, if number % 2 == 0 { proto::TCP } else { proto::UDP }), now, flags)
            };
            match what {
                0 | 1 => {
                    let so_far = stories.bad(&seen, &if what == 0 { REWRITTEN } else { Circumstances::default() }, &parameters(30 * SECOND, 4));
                    prop_assert!(so_far.attempt >= 1);
                    prop_assert!(so_far.expected.is_none_or(|(expected, _)| expected > now));
                }
                2 => ends += u64::from(stories.good(&seen, &parameters(30 * SECOND, 4)).is_some()),
                _ => ends += stories.expire(now).len() as u64,
            }
            let Tally { opened, recovered, not_recovered, evicted } = stories.tally();
            prop_assert_eq!(opened, recovered + not_recovered + evicted + stories.open() as u64);
            prop_assert_eq!(ends, recovered + not_recovered);
            prop_assert_eq!(stories.awaiting().uplinks, stories.open() > 0);
            prop_assert_eq!(stories.stories.len(), stories.by_age.len());
            prop_assert_eq!(stories.stories.len(), stories.by_deadline.len());
        }
        stories.expire(now + 10_000 * SECOND);
        prop_assert_eq!(stories.open(), 0);
        prop_assert!(stories.stories.is_empty());
    }
}

#[test]
fn a_lost_query_is_good_again_when_the_entry_has_expired() {
    let world = parameters(30 * SECOND, 4);
    let mut stories = Stories::default();
    for (number, at) in [(1, START), (2, START + 5 * SECOND)] {
        let so_far = stories.bad(&packet(udp(), at, 0), &REWRITTEN, &world);
        // When a program asks again is its own business.
        assert_eq!((so_far.attempt, so_far.expected, so_far.timeout), (number, None, Some(30 * SECOND)));
    }
    let ended = stories.good(&Seen { sport: 4000, ..packet(udp(), START + 36 * SECOND, 0) }, &world).unwrap();
    assert_eq!((ended.outcome, ended.by, ended.bad), (Outcome::GoodAgain, Some(By::Timeout), 2));
    assert!(!stories.awaiting().uplinks);
}

#[test]
fn an_assured_entry_lives_longer() {
    let entry = Some(Entry { before: 1, after: 2, is_assured: true });
    let so_far = Stories::default().bad(
        &packet(tcp(), START, SYN),
        &Circumstances { entry, ..REWRITTEN },
        &parameters(5 * SECOND, 0),
    );
    assert_eq!(so_far.timeout, Some(20 * SECOND));
    // 1 + 2 + 4 + 8 + 16 + 32: the first gap of at least 20 s.
    assert_eq!(so_far.expected, Some((START + 63 * SECOND, By::Timeout)));
}

#[test]
fn nothing_is_expected_of_what_nat_or_the_mark_does_not_explain() {
    let world = parameters(30 * SECOND, 0);
    for circumstances in [Circumstances { is_marked: false, ..REWRITTEN }, Circumstances { entry: None, ..REWRITTEN }] {
        let so_far = Stories::default().bad(&packet(tcp(), START, SYN), &circumstances, &world);
        assert_eq!(so_far.expected, None);
    }
    let unknown = Parameters { udp_timeout: None, ..world };
    assert_eq!(Stories::default().bad(&packet(tcp(), START, SYN), &REWRITTEN, &unknown).expected, None);
}

/// A retry that is a new outer flow and broken again: it is not the first packet alone that is marked.
#[test]
fn a_flow_that_is_rewritten_anew_is_not_expected_to_recover() {
    let world = parameters(30 * SECOND, 0);
    let mut stories = Stories::default();
    stories.bad(&packet(tcp(), START, SYN), &REWRITTEN, &world);
    let entry = Some(Entry { before: 4000, after: 9, is_assured: false });
    let anew = stories.bad(&packet(tcp(), START + SECOND, SYN), &Circumstances { entry, ..REWRITTEN }, &world);
    assert_eq!((anew.expected, anew.is_rewritten_anew), (None, true));
}

/// The kernel program holds repeats back and counts them; they are in the story nevertheless.
#[test]
fn packets_that_were_held_back_are_counted() {
    let world = parameters(30 * SECOND, 4);
    let mut stories = Stories::default();
    stories.bad(&Seen { counted: 1, counted_syns: 1, ..packet(tcp(), START, SYN) }, &REWRITTEN, &world);
    let held_back = START + 900 * MS;
    let so_far = stories.bad(
        &Seen { counted: 5, counted_syns: 5, last_bad: held_back, ..packet(tcp(), START + 2 * SECOND, SYN) },
        &REWRITTEN,
        &world,
    );
    assert_eq!(so_far.attempt, 5);
    let last_bad = START + 3 * SECOND;
    let good = Seen { counted: 7, counted_syns: 7, last_bad, sport: 1, ..packet(tcp(), START + 4 * SECOND, ACK) };
    let ended = stories.good(&good, &world).unwrap();
    assert_eq!((ended.bad, ended.bad_syns, ended.last_bad, ended.outcome), (7, 7, last_bad, Outcome::Connected));
}

/// The same addresses and ports, used again much later, are another story.
#[test]
fn counts_of_long_ago_are_left_out() {
    let world = parameters(30 * SECOND, 4);
    let seen = Seen { counted: 8, counted_syns: 8, last_bad: START, ..packet(tcp(), START + 900 * SECOND, SYN) };
    assert_eq!(Stories::default().bad(&seen, &REWRITTEN, &world).attempt, 1);
    // Not so if it was just now: the line was lost, the packet was not.
    let seen = Seen { last_bad: START + 899 * SECOND, ..seen };
    assert_eq!(Stories::default().bad(&seen, &REWRITTEN, &world).attempt, 8);
}

#[test]
fn a_good_syn_without_an_answer_is_no_recovery() {
    let world = parameters(3 * SECOND, 0);
    let mut stories = Stories::default();
    stories.bad(&packet(tcp(), START, SYN), &REWRITTEN, &world);
    assert_eq!(stories.good(&packet(tcp(), START + SECOND, SYN), &world), None);
    assert!(stories.expire(START + 2 * SECOND).is_empty());
    let ended = stories.expire(START + 60 * SECOND);
    assert_eq!(ended[0].outcome, Outcome::NotAnswered);
    assert_eq!(ended[0].first_good, Some(START + SECOND));
}

#[test]
fn a_reset_is_no_recovery() {
    let mut stories = Stories::default();
    stories.bad(&packet(tcp(), START, SYN), &REWRITTEN, &parameters(3 * SECOND, 0));
    let ended = stories.good(&packet(tcp(), START + MS, tcp_flag::RST), &parameters(3 * SECOND, 0)).unwrap();
    assert_eq!(ended.outcome, Outcome::Reset);
    assert_eq!(stories.tally().not_recovered, 1);
}

/// Bulk data whose large packets are right and whose small ones are not: one recovery is told, not hundreds.
#[test]
fn a_connection_that_goes_on_good_and_bad_recovers_once() {
    let world = parameters(30 * SECOND, 4);
    let mut stories = Stories::default();
    let mut ends = 0;
    for second in 0..20 {
        let at = START + second * SECOND;
        stories.bad(&packet(tcp(), at, ACK), &REWRITTEN, &world);
        ends += u32::from(stories.good(&packet(tcp(), at + MS, ACK), &world).is_some());
    }
    assert_eq!((ends, stories.tally().opened), (1, 1));
}

#[test]
fn the_oldest_gives_way_and_is_counted() {
    let world = parameters(30 * SECOND, 4);
    let mut stories = Stories::default();
    for number in 0..MOST as u32 + 3 {
        stories.bad(&packet(connection(number, proto::UDP), START + u64::from(number), 0), &REWRITTEN, &world);
    }
    assert_eq!((stories.open(), stories.tally().evicted), (MOST, 3));
    assert_eq!(stories.good(&packet(connection(2, proto::UDP), START + SECOND, 0), &world), None);
    assert!(stories.good(&packet(connection(3, proto::UDP), START + SECOND, 0), &world).is_some());
    // What is to end at once ends bit by bit.
    let (mut ended, mut calls) = (0, 0);
    while stories.open() > 0 {
        let now = stories.expire(START + 1000 * SECOND).len();
        assert!(now <= 256);
        (ended, calls) = (ended + now, calls + 1);
    }
    assert_eq!((ended, calls), (MOST - 1, MOST / 256));
}

#[test]
fn devices_are_waited_for_apart() {
    let world = parameters(30 * SECOND, 4);
    let mut stories = Stories::default();
    let on_device = Connection { scope: DEVICE | 7, ..udp() };
    stories.bad(&packet(on_device, START, 0), &Circumstances::default(), &world);
    assert_eq!(stories.awaiting(), Awaiting { uplinks: false, devices: [7].into() });
    stories.bad(&packet(Connection { scope: NO_VNI, ..udp() }, START, 0), &Circumstances::default(), &world);
    assert!(stories.awaiting().uplinks);
    stories.good(&packet(on_device, START, 0), &world);
    assert_eq!(stories.awaiting(), Awaiting { uplinks: true, devices: BTreeSet::new() });
}
