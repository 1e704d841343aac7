//! The judge against packets of which the right verdict is known, and against anything else.
//!
//! The packets and the right sums come from `generate`, which shares no arithmetic with the crate.

#![expect(clippy::panic, reason = "a test may fail loudly, in its helpers too")]

mod generate;

use generate::{ICMP, ICMPV6, Inside, Place, Rng, Row, Sample, Shape, TCP, Told, UDP, congruent, field_of, get, put};
use proptest::prelude::*;
use vxmon_common::{
    judge::{self, Finding, Glance, Outcome, Packed, Reason, SKB_GSO_UDP_TUNNEL, Skb, State, Verdict},
    packet::{self, Bytes, Family, Fragment, Ip, Stop},
};

/// EtherType of IPv4, memory order.
const IPV4: u16 = 0x0800_u16.to_be();

fn uplink_told(bytes: &[u8], told: &Told) -> Option<Outcome> {
    judge::uplink(&Bytes::new(bytes), told, None).map(|found| found.outcome)
}

fn uplink(bytes: &[u8], skb: Skb) -> Option<Outcome> {
    uplink_told(bytes, &Told::new(skb))
}

fn vxlan_device(bytes: &[u8], skb: Skb) -> Option<Outcome> {
    judge::vxlan_device(&Bytes::new(bytes), &Told::new(skb), None).map(|found| found.outcome)
}

fn finding(outcome: Option<Outcome>) -> Finding {
    match outcome {
        Some(Outcome::Judged(finding)) => finding,
        other => panic!("not judged: {other:?}"),
    }
}

fn verdict(outcome: Option<Outcome>) -> Verdict {
    finding(outcome).verdict
}

/// Any packet of any row.
fn sample(seed: u64) -> Sample {
    let mut rng = Rng(seed);
    let row = rng.pick(&Row::ALL);
    Sample::any(&mut rng, row)
}

/// An inner UDP checksum that is not used says nothing of how the outer one was made: by what a tunnel inside the tunnel holds,
/// perhaps. Without the skb's metadata such a packet stays open.
#[test]
fn an_unused_inner_checksum_leaves_the_outer_one_open_without_metadata() {
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let row = Row::Full(State::None);
        let shape =
            Shape { v6: seed % 2 == 0, inside: Inside::Ip { v6: false, proto: UDP }, ..Shape::any(&mut rng, row, 100) };
        let mut sample = Sample::make(&mut rng, shape);
        let Some(inner) = sample.inner else { continue };
        put(&mut sample.bytes, inner.l4 + 6, 0);
        put(&mut sample.bytes, sample.outer.l4 + 6, 0x1234);
        let outcome = uplink(&sample.bytes, Skb::UNKNOWN);
        let is_right = uplink(&sample.bytes, sample.skb).is_some_and(
            |outcome| matches!(outcome, Outcome::Judged(Finding { verdict, .. }) if !verdict.is_anomaly()),
        );
        assert!(is_right || outcome == Some(Outcome::Unverified(Reason::Ambiguous)), "{outcome:?}: {:?}", sample.shape);
    }
}

/// A glance is enough for a good part of all tunnel packets, and for what is none.
#[test]
fn a_glance_mostly_suffices() {
    let glances = (0..300).map(|seed| {
        let sample = sample(seed);
        judge::glance(&Bytes::new(sample.bytes.get(..42).unwrap_or_default()), &Told::new(sample.skb))
    });
    let tunnels = glances.filter(|glance| matches!(glance, Glance::Tunnel(_))).count();
    assert!(tunnels > 60, "only {tunnels} of 300 tunnel packets");
    let mut arp = [0; 42];
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert!(matches!(judge::glance(&Bytes::new(&arp), &Told::new(Skb::UNKNOWN)), Glance::Other));
}

/// A packet of this row with TCP inside.
fn tcp(rng: &mut Rng, row: Row, v6: bool) -> Sample {
    let shape = Shape { v6, inside: Inside::Ip { v6: false, proto: TCP }, ..Shape::any(rng, row, 100) };
    Sample::make(rng, shape)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_row_has_its_verdict(seed in any::<u64>()) {
        for row in Row::ALL {
            let sample = Sample::any(&mut Rng(seed), row);
            let found = finding(uplink(&sample.bytes, sample.skb));
            prop_assert_eq!(found.verdict, row.verdict(), "{:?}", sample.shape);
            prop_assert_eq!(u16::from_be(found.seen), sample.outer_check());
            if found.verdict != Verdict::Zero {
                prop_assert_eq!(found.expected, Some(found.seen));
            }
        }
    }

    /// A glance at the first bytes never says other than the whole walk, and mostly says something.
    #[test]
    fn a_glance_agrees_with_the_walk(seed in any::<u64>(), at in 0_usize..42, byte in any::<u8>(), change in any::<bool>()) {
        let mut sample = sample(seed);
        if change && at < sample.bytes.len() {
            sample.bytes[at] = byte;
        }
        let told = Told::new(sample.skb);
        let (head, packet) = (sample.bytes.get(..42).unwrap_or_default(), Bytes::new(&sample.bytes));
        let walked = judge::tunnel(&packet, &told, None);
        match (judge::glance(&Bytes::new(head), &told), walked) {
            (Glance::Unclear, _) | (Glance::Other, None) => {}
            (Glance::Tunnel(glanced), Some(walked)) => prop_assert_eq!(format!("{glanced:?}"), format!("{walked:?}")),
            (glanced, walked) => prop_assert!(false, "{glanced:?}, but {walked:?}: {:?}", sample.shape),
        }
    }

    /// What crosses between the kernel program's functions says the same.
    #[test]
    fn outcomes_are_the_same_when_packed(seed in any::<u64>()) {
        let sample = sample(seed);
        let told = Told::new(sample.skb);
        if let Some(ip) = judge::tunnel(&Bytes::new(&sample.bytes), &told, None) {
            let packed = judge::outer(&Bytes::new(&sample.bytes), &told, &ip);
            prop_assert_eq!(Packed::from_bits(packed.to_bits()).outcome(), uplink_told(&sample.bytes, &told).unwrap());
            match packed.outcome() {
                Outcome::Judged(finding) => {
                    prop_assert_eq!(packed.is_anomaly(), finding.verdict.is_anomaly());
                    prop_assert_eq!(packed.number(), finding.verdict as u8);
                    prop_assert_eq!(packed.has_expected().then_some(packed.expected()), finding.expected);
                }
                Outcome::Unverified(reason) => prop_assert_eq!((packed.is_anomaly(), packed.number()), (false, reason as u8)),
            }
        }
    }

    /// Without the skb's metadata no good packet is called anything else.
    #[test]
    fn good_packets_are_good_without_metadata(seed in any::<u64>()) {
        for row in Row::ALL {
            let sample = Sample::any(&mut Rng(seed), row);
            let verdict = verdict(uplink(&sample.bytes, Skb::UNKNOWN));
            prop_assert!(!verdict.is_anomaly(), "{:?}: {:?}", verdict, sample.shape);
        }
    }

    /// On the VXLAN device: the frame before it is encapsulated.
    #[test]
    fn inner_frames_are_good(seed in any::<u64>()) {
        for row in Row::ALL {
            let sample = Sample::any(&mut Rng(seed), row);
            let Some((frame, skb, place)) = sample.frame() else { continue };
            for skb in [skb, Skb::UNKNOWN] {
                let outcome = vxlan_device(&frame, skb);
                let Some(field) = field_of(place.proto) else {
                    prop_assert_eq!(outcome, None);
                    continue;
                };
                let sum = get(&frame, place.l4 + field);
                let expected = match sum {
                    0 if place.proto == UDP => Verdict::Zero,
                    _ if sample.skb.state == State::Partial && row != Row::Outer => Verdict::Pending,
                    _ => Verdict::Valid,
                };
                // A final sum that happens to be the pseudo-header's too: without metadata either reading will do.
                let either = skb == Skb::UNKNOWN && congruent(place.pseudo(&frame), sum);
                let verdict = verdict(outcome);
                prop_assert!(verdict == expected || either && verdict == Verdict::Pending, "{:?}: {:?}", verdict, sample.shape);
            }
        }
    }

    /// Any change of a word under a final sum is noticed, if it changes the sum, and the right value is told.
    #[test]
    fn changes_under_a_full_sum_are_noticed(seed in any::<u64>(), at in any::<prop::sample::Index>(), word in any::<u16>(), byte in 1_u8..) {
        let mut rng = Rng(seed);
        let mut sample = Sample::any(&mut rng, Row::Full(State::None));
        let outer = sample.outer;
        // Addresses, or all behind length and checksum; the ports decide whether it is a tunnel's packet.
        let (addresses, count) = outer.addresses();
        let at = match at.index(count + outer.end - outer.l4 - 8) {
            at if at < count => addresses + at,
            at => outer.l4 + 8 + at - count,
        };
        if rng.chance(50) {
            sample.bytes[at] ^= byte;
        } else if at + 1 < outer.end {
            put(&mut sample.bytes, at & !1, word);
        }
        let right = outer.full(&sample.bytes, 6);
        let found = finding(uplink(&sample.bytes, sample.skb));
        let hidden = congruent(right, sample.outer_check());
        prop_assert_eq!(found.verdict, if hidden { Verdict::Valid } else { Verdict::BadOuter });
        prop_assert!(congruent(u16::from_be(found.expected.unwrap()), right));
        if !hidden {
            prop_assert_eq!(u16::from_be(found.expected.unwrap()), right);
        }
    }

    /// A sum by Local Checksum Offload covers outer addresses and all headers; the payload is covered by the inner sum,
    /// which is still to come.
    #[test]
    fn changes_under_an_lco_sum_are_noticed(seed in any::<u64>(), at in any::<prop::sample::Index>(), byte in 1_u8..) {
        let mut sample = Sample::any(&mut Rng(seed), Row::Lco);
        let (outer, inner) = (sample.outer, sample.inner.unwrap());
        let at = outer.l4 + 8 + at.index(outer.end - outer.l4 - 8);
        sample.bytes[at] ^= byte;
        let field = inner.l4 + field_of(inner.proto).unwrap();
        let noticed = at < inner.l4 || (field..field + 2).contains(&at);
        let found = finding(uplink(&sample.bytes, sample.skb));
        prop_assert_eq!(found.verdict, if noticed { Verdict::BadOuter } else { Verdict::LcoValid }, "byte {}", at);
        if !noticed {
            return Ok(());
        }
        // What a device would send is wrong in just that case: it fills in the inner sum over what lies there.
        let mut sent = sample.bytes.clone();
        let sum = !generate::plain_sum(&sent[inner.l4..inner.end]);
        put(&mut sent, field, if sum == 0 { 0xffff } else { sum });
        prop_assert_eq!(outer.full(&sent, 6), u16::from_be(found.expected.unwrap()));
    }

    /// A pending sum covers addresses and length only.
    #[test]
    fn a_wrong_pending_sum_is_noticed(seed in any::<u64>(), wrong in 1_u16..) {
        for row in [Row::Gso, Row::Outer] {
            let mut sample = Sample::any(&mut Rng(seed), row);
            let right = sample.outer_check();
            put(&mut sample.bytes, sample.outer.l4 + 6, wrong);
            let found = finding(uplink(&sample.bytes, sample.skb));
            prop_assert_eq!(found.verdict, if congruent(right, wrong) { Verdict::Pending } else { Verdict::BadOuter });
            let expected = u16::from_be(found.expected.unwrap());
            prop_assert_eq!(expected, if congruent(right, wrong) { wrong } else { right });
        }
    }

    /// A sum in a segmented packet whose tunnel sends none.
    #[test]
    fn a_sum_where_none_belongs_is_named(seed in any::<u64>(), wrong in 1_u16..) {
        let mut sample = Sample::any(&mut Rng(seed), Row::NoOuterGso);
        put(&mut sample.bytes, sample.outer.l4 + 6, wrong);
        let found = finding(uplink(&sample.bytes, sample.skb));
        prop_assert_eq!((found.verdict, found.expected), (Verdict::NatMangledZero, Some(0)));
    }

    /// The sum of a frame on the VXLAN device, broken.
    #[test]
    fn a_wrong_inner_sum_is_noticed(seed in any::<u64>(), wrong in any::<u16>()) {
        for row in [Row::Full(State::None), Row::Lco, Row::Gso] {
            let sample = Sample::any(&mut Rng(seed), row);
            let Some((mut frame, skb, place)) = sample.frame() else { continue };
            let Some(field) = field_of(place.proto) else { continue };
            let at = place.l4 + field;
            // Segmented without the length, as some guests have it, is right too.
            let spared = (row == Row::Gso).then(|| without_length(&frame, &place));
            let right = if row == Row::Full(State::None) { place.full(&frame, field) } else { place.pseudo(&frame) };
            put(&mut frame, at, wrong);
            let expected = if wrong == 0 && place.proto == UDP {
                Verdict::Zero
            } else if !congruent(right, wrong) && !spared.is_some_and(|sum| congruent(sum, wrong)) {
                // Of what is called ICMP the pseudo-header sum is no reading.
                Verdict::BadInner
            } else {
                match row { Row::Full(_) => Verdict::Valid, _ => Verdict::Pending }
            };
            prop_assert_eq!(verdict(vxlan_device(&frame, skb)), expected, "{:?}", sample.shape);
        }
    }

    #[test]
    fn nothing_makes_it_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        seed in any::<u64>(), more in any::<u32>(), bare in proptest::option::of(any::<u16>()), sum_payload in any::<bool>(),
    ) {
        let mut rng = Rng(seed);
        let told = Told { skb: generate::any_skb(&mut rng, bytes.len()), sum_payload, no_zero_ipv6: true };
        for ethertype in [None, bare, Some(IPV4), Some(0x86dd_u16.to_be())] {
            for packet in [Bytes::new(&bytes), Bytes::truncated(&bytes, more), Bytes::truncated(&bytes, u32::MAX)] {
                let _ = judge::uplink(&packet, &told, ethertype);
                let _ = judge::vxlan_device(&packet, &told, ethertype);
            }
        }
    }

    /// Packets that were whole once get further than random bytes.
    #[test]
    fn broken_packets_do_not_make_it_panic(seed in any::<u64>(), more in any::<u32>()) {
        let mut rng = Rng(seed);
        let mut sample = sample(seed);
        for _ in 0..4 {
            generate::break_one(&mut rng, &mut sample);
        }
        for skb in [sample.skb, Skb::UNKNOWN, generate::any_skb(&mut rng, sample.bytes.len())] {
            let told = Told::new(skb);
            for packet in [Bytes::new(&sample.bytes), Bytes::truncated(&sample.bytes, more)] {
                let _ = judge::uplink(&packet, &told, None);
                let _ = judge::vxlan_device(&packet, &told, None);
            }
        }
    }

    /// A capture cut short: what is right of a whole packet is right of the rest, or open; never an anomaly.
    #[test]
    fn a_cut_record_is_no_anomaly(seed in any::<u64>(), cut in any::<prop::sample::Index>()) {
        let sample = sample(seed);
        let kept = &sample.bytes[..cut.index(sample.bytes.len())];
        for skb in [sample.skb, Skb::UNKNOWN] {
            let packet = Bytes::truncated(kept, sample.bytes.len() as u32);
            if let Some(found) = judge::uplink(&packet, &Told::new(skb), None)
                && let Outcome::Judged(Finding { verdict, .. }) = found.outcome
            {
                prop_assert!(!verdict.is_anomaly(), "{:?} of {:?}", verdict, sample.shape);
            }
        }
    }

    #[test]
    fn a_walk_survives_packing(l3 in 0_u32..40, l4 in 0_u32..1 << 20, end in 0_u32..1 << 20, proto in any::<u8>(), bits in 0_u8..12) {
        let ip = Ip {
            family: if bits & 1 == 0 { Family::V4 } else { Family::V6 },
            l3,
            l4,
            end,
            proto,
            fragment: [Fragment::No, Fragment::First, Fragment::Later][usize::from(bits / 4)],
            rerouted: bits & 2 != 0,
        };
        let back = Ip::unpack(Ip::pack(Ok(ip)), l3);
        prop_assert_eq!(format!("{:?}", back), format!("{:?}", Ok::<_, Stop>(ip)));
    }
}

fn without_length(frame: &[u8], place: &Place) -> u16 {
    let (at, len) = place.addresses();
    let mut header = frame[at..at + len].to_vec();
    header.extend([0, place.proto]);
    generate::plain_sum(&header)
}

#[test]
fn failed_walks_survive_packing() {
    for stop in [Stop::NotIp, Stop::Unreadable] {
        assert_eq!(Ip::unpack(Ip::pack(Err(stop)), 14).err(), Some(stop));
    }
}

/// etherparse, of which neither the generator nor the crate knows, reads the same packets and sums.
#[test]
fn etherparse_agrees_with_the_generator() {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let mut seen = 0;
    for seed in 0..500 {
        let mut rng = Rng(seed);
        let shape = Shape { tags: 0, more_headers: false, ..Shape::any(&mut rng, Row::Full(State::None), 200) };
        let sample = Sample::make(&mut rng, shape);
        let sliced = SlicedPacket::from_ethernet(&sample.bytes).unwrap();
        let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("not UDP: {sliced:?}") };
        let header = udp.to_header();
        let sum = match sliced.net.unwrap() {
            NetSlice::Ipv4(ip) => header.calc_checksum_ipv4(&ip.header().to_header(), udp.payload()),
            NetSlice::Ipv6(ip) => header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload()),
            other => panic!("not IP: {other:?}"),
        };
        assert_eq!(sum.unwrap(), header.checksum);
        seen += 1;
    }
    assert_eq!(seen, 500);
}

#[test]
fn other_packets_are_none_of_its_business() {
    let mut rng = Rng(1);
    for _ in 0..200 {
        let shape = Shape { port: 4790, ..Shape::any(&mut rng, Row::Lco, 50) };
        let sample = Sample::make(&mut rng, shape);
        assert_eq!(uplink(&sample.bytes, sample.skb), None);
        let shape = Shape { inside: Inside::Arp, gpe: false, ..Shape::any(&mut rng, Row::Full(State::None), 50) };
        let sample = Sample::make(&mut rng, shape);
        assert_eq!(vxlan_device(&sample.bytes[sample.outer.l4 + 16..], sample.skb), None);
    }
}

/// A device without Ethernet headers.
#[test]
fn bare_packets() {
    let mut rng = Rng(2);
    for row in Row::ALL {
        let shape = Shape { v6: false, tags: 0, ..Shape::any(&mut rng, row, 100) };
        let sample = Sample::make(&mut rng, shape);
        let skb = Skb { csum_start: sample.skb.csum_start.saturating_sub(14), ..sample.skb };
        let found = judge::uplink(&Bytes::new(&sample.bytes[14..]), &Told::new(skb), Some(IPV4)).unwrap();
        assert_eq!(finding(Some(found.outcome)).verdict, row.verdict());
    }
}

#[test]
fn lengths_that_contradict_are_malformed() {
    let mut rng = Rng(3);
    for v6 in [false, true] {
        for row in Row::ALL {
            let good = tcp(&mut rng, row, v6);
            let udp_length = get(&good.bytes, good.outer.l4 + 4);
            for length in [0, 1, 7, udp_length + 1, 0xffff] {
                let mut bad = good.clone();
                put(&mut bad.bytes, good.outer.l4 + 4, length);
                assert_eq!(verdict(uplink(&bad.bytes, bad.skb)), Verdict::Malformed, "UDP length {length}, {row:?}");
            }
            let at = good.outer.l3 + if v6 { 4 } else { 2 };
            let ip_length = get(&good.bytes, at);
            // Longer than the packet; shorter than UDP; 0 without being longer than the field can tell.
            for length in [ip_length + 1, 0xffff, if v6 { 7 } else { 27 }, 0] {
                let mut bad = good.clone();
                put(&mut bad.bytes, at, length);
                assert_eq!(verdict(uplink(&bad.bytes, bad.skb)), Verdict::Malformed, "IP length {length}, {row:?}");
            }
            let mut cut = good.clone();
            cut.bytes.pop();
            assert_eq!(verdict(uplink(&cut.bytes, cut.skb)), Verdict::Malformed);
        }
    }
}

/// Ethernet pads short frames; what lies behind the IP packet is no part of the sum.
#[test]
fn padding_is_not_summed() {
    let mut rng = Rng(4);
    for row in Row::ALL {
        for skb in [false, true] {
            let mut sample = Sample::any(&mut rng, row);
            sample.bytes.extend(rng.bytes(17));
            let skb = if skb { sample.skb } else { Skb::UNKNOWN };
            assert!(!verdict(uplink(&sample.bytes, skb)).is_anomaly(), "{:?}", sample.shape);
        }
    }
}

#[test]
fn fragments_are_left_open() {
    let mut rng = Rng(5);
    let fragment = Some(Outcome::Unverified(Reason::Fragment));
    for row in Row::ALL {
        let mut sample = tcp(&mut rng, row, false);
        let at = sample.outer.l3 + 6;
        put(&mut sample.bytes, at, 0x2000); // more fragments, offset 0
        assert_eq!(uplink(&sample.bytes, sample.skb), fragment);
        put(&mut sample.bytes, at, 0x0001); // the last one, which has no UDP header
        assert_eq!(uplink(&sample.bytes, sample.skb), None);
        put(&mut sample.bytes, at, 0x8000); // the reserved bit is no fragment
        assert_eq!(verdict(uplink(&sample.bytes, sample.skb)), row.verdict());

        let shape = Shape { tags: 0, more_headers: false, ..Shape::any(&mut rng, row, 50) };
        let mut sample = Sample::make(&mut rng, Shape { v6: true, ..shape });
        let (l3, l4) = (sample.outer.l3, sample.outer.l4);
        sample.bytes.splice(l4..l4, [UDP, 0, 0, 1, 0, 0, 0, 9]); // more fragments, offset 0
        sample.bytes[l3 + 6] = 44;
        let length = (sample.bytes.len() - l3 - 40) as u16;
        put(&mut sample.bytes, l3 + 4, length);
        let skb = Skb { csum_start: sample.skb.csum_start + 8, ..sample.skb };
        assert_eq!(uplink(&sample.bytes, skb), fragment);
        put(&mut sample.bytes, l4 + 2, 8 << 3 | 1);
        assert_eq!(uplink(&sample.bytes, skb), None);
        put(&mut sample.bytes, l4 + 2, 0); // atomic
        assert_eq!(verdict(uplink(&sample.bytes, skb)), row.verdict());
    }
    // On the VXLAN device either kind is a fragment of something with a sum.
    let sample = tcp(&mut rng, Row::Full(State::None), false);
    let Some((mut frame, skb, place)) = sample.frame() else { return };
    for field in [0x2000, 0x0001] {
        put(&mut frame, place.l3 + 6, field);
        assert_eq!(vxlan_device(&frame, skb), fragment);
    }
}

#[test]
fn zero_over_ipv6() {
    let mut rng = Rng(6);
    for (v6, port, no_zero_ipv6, expected) in [
        (true, 4789, true, Verdict::ZeroOuterV6),
        (true, 4789, false, Verdict::Zero),
        (true, 8472, true, Verdict::Zero),
        (false, 4789, true, Verdict::Zero),
    ] {
        for row in [Row::NoOuter, Row::NoOuterGso] {
            let shape = Shape { v6, port, ..Shape::any(&mut rng, row, 60) };
            let sample = Sample::make(&mut rng, shape);
            let told = Told { no_zero_ipv6, ..Told::new(sample.skb) };
            assert_eq!(verdict(uplink_told(&sample.bytes, &told)), expected);
        }
    }
}

/// Only what needs the whole payload is sampled.
#[test]
fn sampling_leaves_full_sums_open() {
    let mut rng = Rng(7);
    for row in Row::ALL {
        let sample = Sample::any(&mut rng, row);
        let told = Told { sum_payload: false, ..Told::new(sample.skb) };
        let outcome = uplink_told(&sample.bytes, &told);
        match row {
            Row::Full(_) => assert_eq!(outcome, Some(Outcome::Unverified(Reason::Sampled))),
            _ => assert_eq!(verdict(outcome), row.verdict()),
        }
    }
}

/// With segments left, the sum was made for the final destination, which is in the routing header.
#[test]
fn rerouted_packets_are_left_open() {
    let mut rng = Rng(8);
    let shape = Shape { tags: 0, v6: true, more_headers: false, ..Shape::any(&mut rng, Row::Full(State::None), 50) };
    let mut sample = Sample::make(&mut rng, shape);
    let (l3, l4) = (sample.outer.l3, sample.outer.l4);
    let mut routing = vec![UDP, 2, 4, 1, 0, 0, 0, 0]; // one segment left
    routing.extend(rng.bytes(16));
    sample.bytes.splice(l4..l4, routing);
    sample.bytes[l3 + 6] = 43;
    let length = (sample.bytes.len() - l3 - 40) as u16;
    put(&mut sample.bytes, l3 + 4, length);
    assert_eq!(uplink(&sample.bytes, sample.skb), Some(Outcome::Unverified(Reason::Ambiguous)));
}

/// Guests that leave the length out of the pseudo-header sum of what their device will segment.
#[test]
fn a_pseudo_header_without_length_is_right_for_segmentation_only() {
    let mut rng = Rng(9);
    for _ in 0..100 {
        let sample = Sample::any(&mut rng, Row::Gso);
        let Some((mut frame, skb, place)) = sample.frame() else { continue };
        let sum = without_length(&frame, &place);
        put(&mut frame, place.l4 + 16, sum);
        assert_eq!(verdict(vxlan_device(&frame, skb)), Verdict::Pending);
        let whole = Skb { gso_size: 0, ..skb };
        assert_eq!(verdict(vxlan_device(&frame, whole)), Verdict::BadInner);
    }
}

/// `UDP_SEGMENT` on a device without checksum offload: CHECKSUM_NONE, and the pseudo-header sum in the field.
#[test]
fn a_packet_to_be_segmented_is_pending_whatever_its_state() {
    let mut rng = Rng(11);
    for round in 0..100 {
        let sample = tcp(&mut rng, Row::Gso, round % 2 == 0);
        let Some((mut frame, skb, place)) = sample.frame() else { continue };
        let states = [State::None, State::Unnecessary, State::Complete];
        let skbs = states.map(|state| Skb { state, csum_start: 0, csum_offset: 0, ..skb });
        for skb in skbs {
            assert_eq!(verdict(vxlan_device(&frame, skb)), Verdict::Pending);
            assert_eq!(verdict(vxlan_device(&frame, Skb { gso_size: 0, ..skb })), Verdict::BadInner);
        }
        let sum = get(&frame, place.l4 + 16);
        put(&mut frame, place.l4 + 16, sum ^ 0x0100);
        for skb in skbs {
            assert_eq!(vxlan_device(&frame, skb), Some(Outcome::Unverified(Reason::Ambiguous)));
        }
    }
}

/// ICMP has no pseudo-header, ICMPv6 does.
#[test]
fn icmp() {
    let mut rng = Rng(10);
    for (v6, proto) in [(false, ICMP), (true, ICMPV6)] {
        let any = Shape::any(&mut rng, Row::Full(State::None), 84);
        let shape = Shape { inside: Inside::Ip { v6, proto }, gpe: false, ..any };
        let sample = Sample::make(&mut rng, shape);
        let (mut frame, skb, place) = sample.frame().unwrap();
        assert_eq!(verdict(vxlan_device(&frame, skb)), Verdict::Valid);
        frame[place.l4 + 20] ^= 1;
        assert_eq!(verdict(vxlan_device(&frame, skb)), Verdict::BadInner);
    }
}

/// BIG TCP: longer than the length fields can tell, which are 0 then.
#[test]
fn big_tcp() {
    let mut rng = Rng(11);
    for v6 in [false, true] {
        for row in [Row::Gso, Row::NoOuterGso] {
            let mut sample = tcp(&mut rng, row, v6);
            sample.bytes.extend(rng.bytes(100_000));
            sample.outer.end = sample.bytes.len();
            let outer = sample.outer;
            put(&mut sample.bytes, outer.l3 + if v6 { 4 } else { 2 }, 0);
            put(&mut sample.bytes, outer.l4 + 4, 0);
            if row == Row::Gso {
                let pseudo = outer.pseudo(&sample.bytes);
                put(&mut sample.bytes, outer.l4 + 6, pseudo);
            }
            assert_eq!(verdict(uplink(&sample.bytes, sample.skb)), row.verdict());
            put(&mut sample.bytes, outer.l4 + 6, 0xffff);
            assert!(verdict(uplink(&sample.bytes, sample.skb)).is_anomaly());
            let full = Skb { state: State::None, ..Skb::UNKNOWN };
            assert_eq!(uplink(&sample.bytes, full), Some(Outcome::Unverified(Reason::TooLong)));
        }
    }
}

/// The inner check field beyond the end, or an offset that wraps around.
#[test]
fn csum_start_and_offset_out_of_reach() {
    let mut rng = Rng(12);
    for _ in 0..200 {
        let sample = tcp(&mut rng, Row::Lco, false);
        let len = sample.bytes.len() as u32;
        for csum_offset in [len, u32::MAX, u32::MAX - sample.skb.csum_start, 0x8000_0000] {
            let skb = Skb { csum_offset, ..sample.skb };
            assert_eq!(uplink(&sample.bytes, skb), Some(Outcome::Unverified(Reason::Unreadable)), "{csum_offset}");
        }
        for csum_start in [0, 14, len + 1, u32::MAX] {
            // No row that is known; any of them may apply.
            let skb = Skb { csum_start, ..sample.skb };
            assert_eq!(verdict(uplink(&sample.bytes, skb)), Verdict::LcoValid, "{csum_start}");
        }
    }
}

/// Segmented, but by what the tunnel bits do not say (UDP_L4, a guest's packet): nothing is assumed.
#[test]
fn segmentation_without_tunnel_bits() {
    let mut rng = Rng(13);
    let sample = tcp(&mut rng, Row::Gso, false);
    let skb = Skb { gso_type: sample.skb.gso_type & 0xff, ..sample.skb };
    assert_eq!(verdict(uplink(&sample.bytes, skb)), Verdict::Pending);
    let skb = Skb { gso_type: SKB_GSO_UDP_TUNNEL, ..sample.skb };
    assert_eq!(verdict(uplink(&sample.bytes, skb)), Verdict::NatMangledZero);
}

/// The walk finds the headers where they were put.
#[test]
fn headers_are_found() {
    let mut rng = Rng(14);
    for _ in 0..2000 {
        let row = rng.pick(&Row::ALL);
        let sample = Sample::any(&mut rng, row);
        let found = judge::uplink(&Bytes::new(&sample.bytes), &Told::new(sample.skb), None).unwrap();
        assert_eq!((found.ip.l3, found.ip.l4), (sample.outer.l3 as u32, sample.outer.l4 as u32));
        assert_eq!(found.ip.end, sample.outer.end as u32);
        let inner = packet::inner(&Bytes::new(&sample.bytes), found.ip.l4);
        match sample.inner {
            Some(place) => {
                let inner = inner.unwrap();
                let (l3, l4, end) = (place.l3 as u32, place.l4 as u32, place.end as u32);
                assert_eq!((inner.l3, inner.l4, inner.end, inner.proto), (l3, l4, end, place.proto));
            }
            None => assert_eq!(inner.err(), Some(Stop::NotIp)),
        }
    }
}
