//! Both NAT faults, made as the kernel makes them, through the judge and to their names.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

mod generate;

use generate::{Inside, Rng, Row, Sample, Shape, TCP, Told, congruent, get, put};
use proptest::prelude::*;
use vxmon_common::{
    conntrack::{Cause, Endpoints, Nat, Predicted, Rewrite, Tuple, cause},
    judge::{self, Finding, Outcome, State, Verdict},
    packet::{self, Bytes},
};

/// A good packet with TCP inside.
fn sample(rng: &mut Rng, row: Row, v6: bool) -> Sample {
    let payload = rng.below(1400);
    let shape = Shape { v6, inside: Inside::Ip { v6: false, proto: TCP }, ..Shape::any(rng, row, payload) };
    Sample::make(rng, shape)
}

/// What source NAT does to the outer packet: `udp_manip_pkt()` and `nf_csum_update()` (net/netfilter/nf_nat_proto.c),
/// `inet_proto_csum_replace4()`, `…16()` and `…2()` (net/core/utils.c). `mangles_zero`: before ea64d8d6c675. Returns by how
/// much a sum that was right before is too large now, in ones' complement.
fn source_nat(sample: &mut Sample, address: Option<&[u8]>, sport: u16, mangles_zero: bool) -> u16 {
    let outer = sample.outer;
    let partial = sample.skb.state == State::Partial;
    let (at, both) = outer.addresses();
    let from = sample.bytes[at..at + both / 2].to_vec();
    let to = address.map_or_else(|| from.clone(), <[u8]>::to_vec);
    let mut check = get(&sample.bytes, outer.l4 + 6);
    let change = add(!generate::plain_sum(&from), generate::plain_sum(&to));
    let change_of_port = add(!get(&sample.bytes, outer.l4), sport);
    if check != 0 || mangles_zero && partial {
        if partial {
            // Taken for a pseudo-header sum: the address's change is added, the port's is left out.
            check = add(check, change);
        } else {
            check = !add(add(!check, change), change_of_port);
        }
        if check == 0 {
            check = 0xffff; // CSUM_MANGLED_0
        }
    }
    sample.bytes[at..at + both / 2].copy_from_slice(&to);
    put(&mut sample.bytes, outer.l4, sport);
    put(&mut sample.bytes, outer.l4 + 6, check);
    // Right would be to subtract both changes.
    if partial { add(add(change, change), change_of_port) } else { 0 }
}

/// Another source port, each as likely as any.
fn other_port(rng: &mut Rng, sample: &Sample) -> u16 {
    get(&sample.bytes, sample.outer.l4).wrapping_add(1 + rng.below(0xffff) as u16)
}

fn add(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(b);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn endpoints(sample: &Sample) -> Endpoints {
    let packet = Bytes::new(&sample.bytes);
    let ip = packet::ip(&packet, if sample.shape.v6 { 0x86dd_u16 } else { 0x0800 }.to_be(), sample.outer.l3 as u32);
    let (src, dst) = packet::addresses(&packet, &ip.unwrap()).unwrap();
    let port = |at: usize| get(&sample.bytes, sample.outer.l4 + at).to_be();
    Endpoints { src, dst, sport: port(0), dport: port(2) }
}

fn tuple(of: &Endpoints, direction: u8) -> Tuple {
    let Endpoints { src, dst, sport, dport } = *of;
    Tuple { src, dst, sport, dport, proto: 17, direction, ..Tuple::default() }
}

fn inverse(of: &Endpoints) -> Endpoints {
    Endpoints { src: of.dst, dst: of.src, sport: of.dport, dport: of.sport }
}

/// The entry of a connection whose packets look like `before`, and leave as `after`.
fn entry(before: &Endpoints, after: &Endpoints) -> (Tuple, Tuple) {
    (tuple(before, 0), tuple(&inverse(after), 1))
}

fn judged(sample: &Sample) -> Finding {
    let found = judge::uplink(&Bytes::new(&sample.bytes), &Told::new(sample.skb), None).unwrap();
    let Outcome::Judged(finding) = found.outcome else { panic!("not judged: {:?}", found.outcome) };
    finding
}

/// What NAT made of a packet, and what the judge and its entry say.
struct Ran {
    sample: Sample,
    /// See [`source_nat`].
    error: u16,
    finding: Finding,
    cause: Cause,
    /// What fault B would have left.
    stale: Option<u16>,
}

fn run(row: Row, seed: u64, v6: bool, new_address: bool, mangles_zero: bool) -> Ran {
    let mut rng = Rng(seed);
    let mut sample = sample(&mut rng, row, v6);
    let before = endpoints(&sample);
    let address = rng.bytes(if v6 { 16 } else { 4 });
    let sport = other_port(&mut rng, &sample);
    let error = source_nat(&mut sample, new_address.then_some(&address), sport, mangles_zero);
    let after = endpoints(&sample);
    let finding = judged(&sample);
    let (orig, reply) = entry(&before, &after);
    let rewrite = Rewrite::find(&orig, &reply, &after);
    let stale = rewrite.zip(finding.expected).map(|(rewrite, expected)| rewrite.stale(expected));
    Ran { cause: cause(&finding, &rewrite.map_or(Nat::None, Nat::Rewritten)), sample, error, finding, stale }
}

/// The packets of `kube-vxlan-lab.sh` on Linux 6.18.44, with `-j SNAT --to-source 10.0.100.44 --random-fully` in place of
/// MASQUERADE; tcpdump: `10.0.100.44.23660 > 10.0.100.15.8472: [bad udp cksum 0x7aae -> 0xa8c4!]`; conntrack:
/// `src=10.0.100.3 dst=10.0.100.15 sport=35540 dport=8472 src=10.0.100.15 dst=10.0.100.44 sport=8472 dport=23660`.
/// And facts of a run without a change of address: 0x76b9 for 0x4212, source port 36512 rewritten to 49991.
#[test]
fn stale_sums_seen_on_a_kernel() {
    let address = |last: u8| [u32::from_ne_bytes([10, 0, 100, last]), 0, 0, 0];
    for (source, sport, new_source, new_sport, seen, right) in
        [(3, 35540_u16, 44, 23660_u16, 0x7aae_u16, 0xa8c4_u16), (3, 36512, 3, 49991, 0x76b9, 0x4212)]
    {
        let (dst, dport) = (address(15), 8472_u16.to_be());
        let before = Endpoints { src: address(source), dst, sport: sport.to_be(), dport };
        let after = Endpoints { src: address(new_source), dst, sport: new_sport.to_be(), dport };
        let (orig, reply) = entry(&before, &after);
        let rewrite = Rewrite::find(&orig, &reply, &after).unwrap();
        assert_eq!(u16::from_be(rewrite.stale(right.to_be())), seen);
    }
}

/// Ports that differ by 0xffff are the same number in ones' complement, so the stale sum is the right one.
#[test]
fn a_change_that_does_not_show_is_no_fault() {
    for row in [Row::Lco, Row::Full(State::None)] {
        let mut sample = sample(&mut Rng(1), row, false);
        let port = get(&sample.bytes, sample.outer.l4);
        // As if it had always been port 0.
        source_nat(&mut sample, None, 0, false);
        let right = add(sample.outer_check(), if row == Row::Lco { port } else { 0 });
        put(&mut sample.bytes, sample.outer.l4 + 6, right);
        assert_eq!(judged(&sample).verdict, row.verdict(), "before, {row:?}");
        let error = source_nat(&mut sample, None, 0xffff, false);
        assert!(congruent(error, 0));
        assert_eq!(judged(&sample).verdict, row.verdict(), "after, {row:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Fault B.
    #[test]
    fn a_stale_port_is_named_and_proved(seed in any::<u64>(), v6 in any::<bool>(), new_address in any::<bool>()) {
        let Ran { sample, error, finding, cause, .. } = run(Row::Lco, seed, v6, new_address, false);
        if congruent(error, 0) {
            // The changes cancel each other out: 0xffff in place of 0 for a port, for instance.
            prop_assert_eq!((finding.verdict, finding.expected), (Verdict::LcoValid, Some(finding.seen)));
            return Ok(());
        }
        prop_assert_eq!(finding.verdict, Verdict::BadOuter);
        prop_assert!(cause.proved, "{:?} {:?}", finding, sample.shape);
        prop_assert_eq!(cause.predicted, Predicted::of(finding.seen));
        prop_assert_eq!(cause.verdict, Verdict::NatStalePort);
    }

    /// Fault A, not segmented: the metadata alone does not tell that there was no sum.
    #[test]
    fn a_mangled_zero_is_named_and_proved(seed in any::<u64>(), v6 in any::<bool>(), new_address in any::<bool>()) {
        let Ran { sample, finding, cause, stale, .. } = run(Row::NoOuter, seed, v6, new_address, true);
        prop_assert!(new_address || sample.outer_check() == 0xffff);
        if finding.expected == Some(finding.seen) {
            prop_assert_eq!(finding.verdict, Verdict::LcoValid); // one in 65,535 is right by chance
            return Ok(());
        }
        prop_assert_eq!(finding.verdict, Verdict::BadOuter);
        // One in 65,535 is what the other fault would have left, too.
        let verdict = if stale == Some(finding.seen) { Verdict::NatStalePort } else { Verdict::NatMangledZero };
        prop_assert_eq!(cause, Cause { verdict, predicted: Predicted::of(finding.seen), proved: true });
    }

    /// Fault A on what is segmented later.
    #[test]
    fn a_mangled_zero_is_named_in_gso(seed in any::<u64>(), v6 in any::<bool>(), new_address in any::<bool>()) {
        let Ran { sample, finding, cause, .. } = run(Row::NoOuterGso, seed, v6, new_address, true);
        prop_assert!(new_address || sample.outer_check() == 0xffff);
        prop_assert_eq!((finding.verdict, finding.expected), (Verdict::NatMangledZero, Some(0)));
        prop_assert_eq!(cause, Cause { verdict: Verdict::NatMangledZero, predicted: Predicted::of(finding.seen), proved: true });
    }

    /// NAT is no fault where the kernel gets it right.
    #[test]
    fn other_rows_survive_nat(seed in any::<u64>(), v6 in any::<bool>(), new_address in any::<bool>(), old in any::<bool>()) {
        for row in Row::ALL {
            let mangles_zero = old && !matches!(row, Row::NoOuter | Row::NoOuterGso);
            if row == Row::Lco {
                continue;
            }
            let Ran { sample, finding, cause, .. } = run(row, seed, v6, new_address, mangles_zero);
            prop_assert_eq!(finding.verdict, row.verdict(), "{:?}", sample.shape);
            prop_assert_eq!(cause, Cause { verdict: row.verdict(), predicted: Predicted::NONE, proved: false });
        }
    }

    /// A wrong value that no fault leaves is not given a fault's name.
    #[test]
    fn other_wrong_values_are_not_named(seed in any::<u64>(), v6 in any::<bool>(), wrong in 1_u16..) {
        let mut rng = Rng(seed);
        let mut sample = sample(&mut rng, Row::Lco, v6);
        let before = endpoints(&sample);
        let address = rng.bytes(if v6 { 16 } else { 4 });
        let sport = other_port(&mut rng, &sample);
        source_nat(&mut sample, Some(&address), sport, false);
        let stale = get(&sample.bytes, sample.outer.l4 + 6);
        put(&mut sample.bytes, sample.outer.l4 + 6, wrong);
        let (after, finding) = (endpoints(&sample), judged(&sample));
        let (orig, reply) = entry(&before, &after);
        let rewrite = Rewrite::find(&orig, &reply, &after).unwrap();
        if finding.verdict != Verdict::BadOuter || congruent(wrong, stale) || finding.seen == rewrite.mangled_zero() {
            return Ok(());
        }
        let named = cause(&finding, &Nat::Rewritten(rewrite));
        prop_assert_eq!((named.verdict, named.proved), (Verdict::BadOuter, false));
        for nat in [Nat::None, Nat::Unknown] {
            let guess = wrong == 0xffff && nat == Nat::Unknown;
            let verdict = if guess { Verdict::NatMangledZero } else { Verdict::BadOuter };
            prop_assert_eq!(cause(&finding, &nat), Cause { verdict, predicted: Predicted::NONE, proved: false });
        }
    }

    /// Answers of a connection to whose destination NAT was applied leave with their source rewritten.
    #[test]
    fn rewrites_are_found_in_both_directions(seed in any::<u64>(), v6 in any::<bool>()) {
        let mut rng = Rng(seed);
        let other = endpoints(&sample(&mut rng, Row::Lco, v6));
        let this = endpoints(&sample(&mut rng, Row::Lco, v6));
        // As the connection's first packet came in, and as its answers come from here.
        let first = Endpoints { sport: this.sport, ..other };
        let answer = this;
        let (orig, reply) = (tuple(&first, 0), tuple(&answer, 1));
        let leaves = inverse(&first);
        let rewrite = Rewrite::find(&orig, &reply, &leaves).unwrap();
        prop_assert_eq!((rewrite.before, rewrite.after), (&reply, &leaves));
        // Neither direction, and nothing rewritten.
        let stranger = Endpoints { sport: !leaves.sport, ..leaves };
        prop_assert_eq!(Rewrite::find(&orig, &reply, &stranger), None);
        let plain = tuple(&inverse(&first), 1);
        prop_assert_eq!(Rewrite::find(&orig, &plain, &first), None);
        prop_assert_eq!(Rewrite::find(&orig, &plain, &leaves), None);
    }
}

/// Where both faults would have left 0xffff, it is taken for the one that every kernel has.
#[test]
fn what_both_faults_leave_is_called_a_stale_port() {
    let dst = [u32::from_ne_bytes([10, 0, 100, 15]), 0, 0, 0];
    let src = [u32::from_ne_bytes([10, 0, 100, 3]), 0, 0, 0];
    let before = Endpoints { src, dst, sport: 36512_u16.to_be(), dport: 8472_u16.to_be() };
    let after = Endpoints { sport: 49991_u16.to_be(), ..before };
    let (orig, reply) = entry(&before, &after);
    let rewrite = Rewrite::find(&orig, &reply, &after).unwrap();
    let expected = (1..=u16::MAX).find(|expected| rewrite.stale(*expected) == 0xffff).unwrap();
    let named =
        |seen| cause(&Finding { verdict: Verdict::BadOuter, seen, expected: Some(expected) }, &Nat::Rewritten(rewrite));
    assert_eq!(named(0xffff), Cause { verdict: Verdict::NatStalePort, predicted: Predicted::of(0xffff), proved: true });
}
